"""The gate: pure, fails closed, and never kinder to a worse number."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from registry.gate import Check, GateLimits, GateRecord, GateSettings, Measurement, default_checks, judge

BADNESS = ("pass", "caution", "fail")
LOSS = Check(metric="loss", kind="max", limit=0.01)
COSINE = Check(metric="cosine", kind="min", limit=0.99, caution_limit=0.98)

numbers = st.floats(-1e6, 1e6)
any_numbers = st.floats(allow_nan=True, allow_infinity=True)
measurements = st.tuples(numbers, numbers, numbers).map(sorted).map(lambda n: Measurement(n[1], n[0], n[2]))
checks = st.builds(
    lambda kind, limit, slack: Check(
        metric="m",
        kind=kind,
        limit=limit,
        caution_limit=None if slack is None else limit - slack if kind == "min" else limit + slack,
    ),
    st.sampled_from(["min", "max"]),
    numbers,
    st.none() | st.floats(0, 1e6),
)


def exactly(value: float) -> Measurement:
    return Measurement(value, value, value)


def verdict_of(check: Check, measurement: Measurement) -> str:
    return judge({check.metric: measurement}, [check]).verdict


@pytest.mark.parametrize(
    ("low", "verdict"),
    [(0.995, "pass"), (0.99, "pass"), (0.9899999, "caution"), (0.98, "caution"), (0.9799999, "fail"), (-1, "fail")],
)
def test_gate_judges_a_minimum_by_the_low_end(low: float, verdict: str) -> None:
    assert verdict_of(COSINE, Measurement(0.999, low, 1.0)) == verdict


@pytest.mark.parametrize(("high", "verdict"), [(0.0, "pass"), (0.01, "pass"), (0.0100001, "fail")])
def test_gate_judges_a_maximum_by_the_high_end(high: float, verdict: str) -> None:
    assert verdict_of(LOSS, Measurement(-0.01, -0.02, high)) == verdict


def test_gate_counts_a_point_worse_than_its_interval() -> None:
    assert verdict_of(LOSS, Measurement(0.5, 0.0, 0.001)) == "fail"


def test_gate_explains_a_failure_to_a_person() -> None:
    check = Check(metric="ndcg_at_10_loss", kind="max", limit=0.01)
    result = judge({"ndcg_at_10_loss": Measurement(0.0123, 0.0042, 0.0208)}, [check]).results[0]
    assert result.reason == ("ndcg_at_10_loss 0.0123 [0.0042, 0.0208]: bad end 0.0208 is over the limit 0.01 by 0.0108")
    assert (result.value, result.low, result.high, result.bad_end) == (0.0123, 0.0042, 0.0208, 0.0208)


@pytest.mark.parametrize(
    ("low", "ending"),
    [
        (0.991, "bad end 0.991 is within the limit 0.99"),
        (0.985, "bad end 0.985 is under the limit 0.99 by 0.005, within the caution limit 0.98"),
        (0.97, "bad end 0.97 is under the limit 0.99 by 0.02, and under the caution limit 0.98"),
        (0.98999999, "bad end 0.98999999 is under the limit 0.99 by 1e-08, within the caution limit 0.98"),
    ],
)
def test_gate_explains_each_verdict(low: float, ending: str) -> None:
    assert judge({"cosine": Measurement(0.995, low, 1.0)}, [COSINE]).results[0].reason.endswith(ending)


def test_gate_fails_a_missing_metric() -> None:
    record = judge({"other": exactly(1.0)}, [LOSS])
    assert record.verdict == "fail"
    assert record.results[0].reason == "loss was not measured"
    assert record.results[0].value is None


@pytest.mark.parametrize("field", ["value", "low", "high"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("check", [LOSS, COSINE])
def test_gate_fails_what_is_not_finite(field: str, number: float, check: Check) -> None:
    # Without this rule -inf would pass every maximum, and inf every minimum.
    good = exactly(0.0) if check is LOSS else exactly(1.0)
    record = judge({check.metric: replace(good, **{field: number})}, [check])
    result = record.results[0]
    assert record.verdict == "fail"
    assert f"is {number}" in result.reason
    assert getattr(result, field) is None
    assert result.bad_end is None
    assert GateRecord.model_validate_json(record.model_dump_json()) == record


def test_gate_fails_an_interval_inside_out() -> None:
    record = judge({"loss": Measurement(0.0, 0.001, -0.001)}, [LOSS])
    assert record.verdict == "fail"
    assert "low 0.001 is above high -0.001" in record.results[0].reason


def test_gate_fails_without_checks() -> None:
    record = judge({"loss": exactly(0.0)}, [])
    assert (record.verdict, record.reason, record.results) == ("fail", "no checks", ())


def test_gate_takes_the_worst_verdict_and_keeps_every_result() -> None:
    good, middling, bad = exactly(0.0), exactly(0.985), exactly(0.5)
    assert judge({"loss": good, "cosine": exactly(1.0)}, [LOSS, COSINE]).reason == "all 2 checks pass"
    record = judge({"loss": good, "cosine": middling}, [LOSS, COSINE])
    assert (record.verdict, record.reason) == ("caution", "caution: cosine")
    record = judge({"loss": bad, "cosine": middling}, [COSINE, LOSS])
    assert (record.verdict, record.reason) == ("fail", "fail: loss; caution: cosine")
    assert [result.verdict for result in record.results] == ["caution", "fail"]


def test_gate_compares_single_precision_numbers_exactly() -> None:
    # float32(0.01) is a little under 0.01, float32(0.1) a little over 0.1.
    assert verdict_of(LOSS, exactly(np.float32(0.01))) == "pass"
    assert verdict_of(COSINE, exactly(np.nextafter(np.float32(0.99), np.float32(0)))) == "caution"
    over = Check(metric="loss", kind="max", limit=0.1)
    assert verdict_of(over, exactly(np.float32(0.1))) == "fail"  # 0.100000001490116


@pytest.mark.parametrize(("kind", "caution"), [("min", 0.6), ("max", 0.4)])
def test_check_refuses_a_caution_limit_stricter_than_its_limit(kind: str, caution: float) -> None:
    with pytest.raises(ValidationError, match="caution_limit"):
        Check(metric="m", kind=kind, limit=0.5, caution_limit=caution)


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_check_refuses_a_limit_that_is_not_finite(limit: float) -> None:
    with pytest.raises(ValidationError):
        Check(metric="m", kind="max", limit=limit)


def test_limits_refuse_unknown_keys_and_a_caution_above_the_pass() -> None:
    with pytest.raises(ValidationError, match="max_loss"):
        GateLimits(max_loss=0.1)
    with pytest.raises(ValidationError, match=r"cosine_mean_caution 0\.98 is above cosine_mean_pass 0\.9"):
        GateLimits(cosine_mean_pass=0.9)


def test_limits_of_one_model_stand_above_the_common_ones() -> None:
    settings = GateSettings(max_task_loss=0.02, models={"minilm": {"max_champion_memory_ratio": 2.0}})
    assert settings.for_model("other") == GateLimits(max_task_loss=0.02)
    assert settings.for_model("minilm") == GateLimits(max_task_loss=0.02, max_champion_memory_ratio=2.0)
    for wrong in ({"max_loss": 0.1}, {"cosine_mean_caution": 0.995}, {"models": {}}):
        with pytest.raises(ValidationError, match=r"models\.minilm"):
            GateSettings(models={"minilm": wrong})


def test_default_checks_cover_what_was_asked_for() -> None:
    def names(with_sts: bool, with_champion: bool) -> list[str]:
        return [check.metric for check in default_checks(GateLimits(), with_sts, with_champion)]

    quality = ["nonfinite", "cosine_mean", "engine_cosine_mean", "ndcg_at_10_loss", "recall_at_10_loss"]
    speed = [
        "latency_ratio_vs_champion", "p95_ratio_vs_champion", "throughput_ratio_vs_champion",
        "memory_ratio_vs_champion", "ndcg_at_10_loss_vs_champion", "recall_at_10_loss_vs_champion",
    ]  # fmt: skip
    assert names(False, False) == quality
    assert names(True, False) == [*quality, "sts_spearman_loss"]
    assert names(False, True) == [*quality, *speed]
    assert names(True, True) == [*quality, "sts_spearman_loss", *speed]


def test_default_checks_take_their_limits() -> None:
    limits = GateLimits(max_task_loss=0.02, tasks=("ndcg_at_10",), max_champion_latency_ratio=1.2)
    found = {check.metric: check for check in default_checks(limits, with_sts=True, with_champion=True)}
    assert found["ndcg_at_10_loss"].limit == found["sts_spearman_loss"].limit == 0.02
    assert found["latency_ratio_vs_champion"] == Check(metric="latency_ratio_vs_champion", kind="max", limit=1.2)
    assert found["throughput_ratio_vs_champion"].kind == "min"
    assert found["nonfinite"] == Check(metric="nonfinite", kind="max", limit=0)
    assert (found["cosine_mean"].limit, found["cosine_mean"].caution_limit) == (0.99, 0.98)
    assert found["engine_cosine_mean"] == Check(metric="engine_cosine_mean", kind="min", limit=0.999)
    assert "recall_at_10_loss" not in found


@pytest.mark.parametrize("served", [exactly(0.9), Measurement(0.9992, 0.9985, 0.9998), None])
def test_default_gate_fails_an_engine_that_does_not_serve_what_was_judged(served: Measurement | None) -> None:
    metrics = {name: exactly(0) for name in ("nonfinite", "ndcg_at_10_loss", "recall_at_10_loss")}
    metrics |= {"cosine_mean": exactly(0.999)} | ({"engine_cosine_mean": served} if served else {})
    record = judge(metrics, default_checks(GateLimits(), with_sts=False, with_champion=False))
    assert (record.verdict, record.reason) == ("fail", "fail: engine_cosine_mean")
    good = judge(
        metrics | {"engine_cosine_mean": Measurement(0.99995, 0.99992, 0.99997)},
        default_checks(GateLimits(), with_sts=False, with_champion=False),
    )
    assert good.verdict == "pass"


def test_default_gate_bites_as_measured() -> None:
    # Measured losses of three recipes on the documentation corpus: dynamic int8, calibrated int8, bfloat16.
    def gate(cosine: float, loss: float, bad_end: float) -> str:
        metrics = {
            "nonfinite": exactly(0),
            "cosine_mean": exactly(cosine),
            "engine_cosine_mean": exactly(1),
            "ndcg_at_10_loss": Measurement(loss, 2 * loss - bad_end, bad_end),
            "recall_at_10_loss": exactly(0),
        }
        return judge(metrics, default_checks(GateLimits(), with_sts=False, with_champion=False)).verdict

    assert gate(0.993, 0.012, 0.021) == "fail"
    assert gate(0.998, 0.002, 0.0097) == "pass"
    assert gate(0.9999, 0.001, 0.004) == "pass"


@given(measurements, checks, st.floats(0, 1e6))
def test_worsening_a_metric_never_improves_the_verdict(m: Measurement, check: Check, worsening: float) -> None:
    step = -worsening if check.kind == "min" else worsening
    worse = Measurement(m.value + step, m.low + step, m.high + step)
    assert BADNESS.index(verdict_of(check, worse)) >= BADNESS.index(verdict_of(check, m))


@given(measurements, checks, st.floats(0, 1e6))
def test_widening_an_interval_never_improves_the_verdict(m: Measurement, check: Check, widening: float) -> None:
    wider = Measurement(m.value, m.low - widening, m.high + widening)
    assert BADNESS.index(verdict_of(check, wider)) >= BADNESS.index(verdict_of(check, m))


@given(st.lists(st.tuples(measurements, checks), min_size=1, max_size=5), st.integers(0, 4))
def test_losing_a_metric_never_improves_the_verdict(pairs: list[tuple[Measurement, Check]], lost: int) -> None:
    named = [check.model_copy(update={"metric": f"m{i}"}) for i, (_, check) in enumerate(pairs)]
    metrics = {f"m{i}": measurement for i, (measurement, _) in enumerate(pairs)}
    before = judge(metrics, named)
    metrics.pop(f"m{lost % len(pairs)}")
    assert judge(metrics, named).verdict == "fail"
    assert before.verdict == max((result.verdict for result in before.results), key=BADNESS.index)


@given(st.builds(Measurement, any_numbers, any_numbers, any_numbers), checks)
def test_record_round_trips_through_json(measurement: Measurement, check: Check) -> None:
    record = judge({"m": measurement}, [check])
    assert GateRecord.model_validate_json(record.model_dump_json()) == record
    assert "NaN" not in record.model_dump_json()


@given(measurements, checks)
def test_reason_never_shows_a_failing_number_as_its_limit(measurement: Measurement, check: Check) -> None:
    result = judge({"m": measurement}, [check]).results[0]
    if result.verdict != "pass":
        shown = result.reason.split("bad end ")[1].split(" is ")[0]
        assert float(shown) != check.limit
