import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.gate import GateLimits, Measurement
from tasks.benchmark import CHAMPION, NUM_BATCHES, TORCH, Speed, SpeedReport
from tasks.evaluate import Quality
from tasks.models.teacher import Teacher
from tasks.quantize import Candidate
from tasks.select import choose, judge_compatibility, pareto_front, select
from tests.forge import Forge

NAMES = ("fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino")

MODELS = {
    (): Teacher(
        uri="x",
        name="x",
        folder=Path("x"),
        tokenizer=Path("x"),
        digest="x",
        dimension=8,
        max_seq_length=8,
        pooling="mean",
        normalize=True,
        prompts={},
        num_parameters=2,
        num_encoder_parameters=1,
    )
}

Point = tuple[float, float, float, int]
POINTS = st.lists(
    st.tuples(
        st.sampled_from([0.9, 0.95, 0.99, 1.0]),
        st.sampled_from([100.0, 200.0, 400.0]),
        st.sampled_from([1.0, 2.0, 4.0]),
        st.sampled_from([10, 20, 40]),
    ),
    min_size=1,
    max_size=5,
)


def measured(value: float, width: float = 0.0) -> Measurement:
    return Measurement(value, value - width, value + width)


def quality(cosine: float = 1.0, **others: Measurement) -> Quality:
    good = dict.fromkeys(("nonfinite", "ndcg_at_10_loss", "recall_at_10_loss"), measured(0.0))
    close = {"cosine_mean": measured(cosine), "engine_cosine_mean": measured(1.0)}
    return Quality(metrics={**close, **good, **others}, num_texts=10, num_queries=10)


def candidate(name: str, disk_bytes: int = 1, runtime: str = "onnxruntime") -> Candidate:
    """As `quantize` describes one; the engine and artifact behind it play no part in selection."""
    return Candidate.model_validate(
        {
            "variant": {
                "name": name,
                "build": "fp32-onnx",
                "runtime": "onnxruntime",
                "precision": "fp32",
                "method": "x",
            },
            "artifact": {"path": "x", "digest": "x"},
            "engine": {"runtime": runtime, "file": "x", "sha256": "0" * 64, "size": 1},
            "max_seq_length": 8,
            "calibration_size": 0,
            "calibration_digest": None,
            "disk_bytes": disk_bytes,
        }
    )


def speeds(points: dict[str, tuple[float, float]]) -> SpeedReport:
    """Throughput and latency by name, each measured in eight equal rounds."""
    return SpeedReport(
        hardware="here",
        mean_tokens=1,
        speeds={
            name: Speed(
                latencies_ms=(latency,) * 8, batch_seconds=(32 / throughput,) * 8 * NUM_BATCHES, peak_memory_mb=1
            )
            for name, (throughput, latency) in points.items()
        },
    )


def front_of(points: list[Point]) -> set[str]:
    names = NAMES[: len(points)]
    return pareto_front(
        [candidate(name, point[3]) for name, point in zip(names, points, strict=True)],
        [quality(point[0]) for point in points],
        speeds({name: (point[1], point[2]) for name, point in zip(names, points, strict=True)}),
    )


def beats(first: Point, second: Point) -> bool:
    better = (first[0] >= second[0], first[1] >= second[1], first[2] <= second[2], first[3] <= second[3])
    return all(better) and first != second


@given(POINTS)
def test_pareto_front_is_exactly_what_nothing_beats(points: list[Point]) -> None:
    expected = {
        name
        for name, own in zip(NAMES[: len(points)], points, strict=True)
        if not any(beats(other, own) for other in points)
    }
    assert front_of(points) == expected
    assert expected  # a front is never empty


@given(POINTS)
def test_pareto_front_keeps_the_best_of_each_measure(points: list[Point]) -> None:
    front = [points[NAMES.index(name)] for name in front_of(points)]
    assert max(p[0] for p in front) == max(p[0] for p in points)
    assert max(p[1] for p in front) == max(p[1] for p in points)
    assert min(p[2] for p in front) == min(p[2] for p in points)
    assert min(p[3] for p in front) == min(p[3] for p in points)


def test_pareto_front_has_no_place_for_what_embeds_no_numbers() -> None:
    points: list[Point] = [(math.nan, 100.0, 4.0, 20), (0.9, 200.0, 2.0, 10)]
    assert front_of(points) == {NAMES[1]}


def test_select_judges_fastest_first_and_chooses_the_fastest_that_passes() -> None:
    found = {TORCH: (50.0, 9.0), "fp32-onnx": (100.0, 4.0), "int8-dynamic": (300.0, 2.0), "int8-openvino": (200.0, 2.0)}
    names = ["fp32-onnx", "int8-dynamic", "int8-openvino"]
    qualities = [quality(1.0), quality(0.97), quality(0.995)]
    judged = select.fn([candidate(n) for n in names], qualities, speeds(found), GateLimits(), MODELS)
    assert [row.name for row in judged] == ["int8-dynamic", "int8-openvino", "fp32-onnx"]
    assert [row.gate.verdict for row in judged] == ["fail", "pass", "pass"]
    assert [row.speedup_vs_torch for row in judged] == pytest.approx([6, 4, 2])
    winner = choose(judged)
    assert winner is not None
    assert winner.name == "int8-openvino"


@pytest.mark.parametrize(
    ("cosine", "verdict"), [(0.985, "caution"), (0.9799, "fail"), (math.nan, "fail"), (0.99, "pass")]
)
def test_choose_takes_only_what_passed(cosine: float, verdict: str) -> None:
    found = speeds({TORCH: (50.0, 9.0), "fp32-onnx": (100.0, 4.0)})
    judged = select.fn([candidate("fp32-onnx")], [quality(cosine)], found, GateLimits(), MODELS)
    assert judged[0].gate.verdict == verdict
    assert (choose(judged) is not None) == (verdict == "pass")


def test_select_of_a_corpus_without_queries_fails_the_gate() -> None:
    bare = Quality(metrics={"cosine_mean": measured(1.0), "nonfinite": measured(0.0)}, num_texts=10, num_queries=0)
    found = speeds({TORCH: (50.0, 9.0), "fp32-onnx": (100.0, 4.0)})
    judged = select.fn([candidate("fp32-onnx")], [bare], found, GateLimits(), MODELS)
    assert judged[0].gate.verdict == "fail"
    assert "ndcg_at_10_loss" in judged[0].gate.reason
    assert choose(judged) is None


@pytest.mark.parametrize(("loss", "verdict"), [(0.01, "pass"), (0.02, "fail"), (None, "fail")])
def test_select_with_sts_checks_its_loss(loss: float | None, verdict: str) -> None:
    found = speeds({TORCH: (50.0, 9.0), "fp32-onnx": (100.0, 4.0)})
    own = quality(**({} if loss is None else {"sts_spearman_loss": measured(loss)}))
    judged = select.fn([candidate("fp32-onnx")], [own], found, GateLimits(), MODELS, with_sts=True)
    assert judged[0].gate.verdict == verdict


@pytest.mark.parametrize(("throughput", "verdict"), [(300.0, "pass"), (285.0, "pass"), (270.0, "fail")])
def test_select_compares_with_the_champion_of_the_same_run(throughput: float, verdict: str) -> None:
    found = speeds({TORCH: (50.0, 9.0), "fp32-onnx": (throughput, 4.0), CHAMPION: (300.0, 4.0)})
    scores = {"ndcg_at_10": [0.5, 0.7], "recall_at_10": [0.5, 0.7]}
    own = quality().model_copy(update={"scores": scores})
    judged = select.fn([candidate("fp32-onnx")], [own], found, GateLimits(), MODELS, champion_scores=scores)
    assert judged[0].gate.verdict == verdict


def test_select_compares_quality_with_the_champion_query_by_query() -> None:
    found = speeds({TORCH: (50.0, 9.0), "fp32-onnx": (300.0, 4.0), CHAMPION: (300.0, 4.0)})
    champion = {"ndcg_at_10": [0.5, 0.7] * 50, "recall_at_10": [1.0, 0.5] * 50}
    worse = {**champion, "ndcg_at_10": [0.48, 0.68] * 50}
    for scores, failed in ((champion, set()), (worse, {"ndcg_at_10_loss_vs_champion"})):
        own = quality().model_copy(update={"scores": scores})
        gate = select.fn([candidate("fp32-onnx")], [own], found, GateLimits(), MODELS, champion_scores=champion)[0].gate
        assert {result.metric for result in gate.results if result.verdict == "fail"} == failed
    unmeasured = select.fn([candidate("fp32-onnx")], [quality()], found, GateLimits(), MODELS, champion_scores=champion)
    assert "ndcg_at_10_loss_vs_champion" in unmeasured[0].gate.reason


def test_spare_of_our_own_kernels_is_the_smallest_portable_candidate_that_passes(forge: Forge) -> None:
    names = ["int8-avx512", "fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino"]
    sizes, runtimes = [9, 90, 24, 23, 8], ["avx512", *["onnxruntime"] * 3, "openvino"]
    found = dict.fromkeys([TORCH, *names], (100.0, 4.0))
    candidates = [candidate(*each) for each in zip(names, sizes, runtimes, strict=True)]
    qualities = [quality(cosine) for cosine in (0.999, 1.0, 0.995, 0.985, 0.999)]
    judged = tuple(select.fn(candidates, qualities, speeds(found), GateLimits(), MODELS))
    study = forge.study.model_copy(update={"judged": judged})
    spare = study.find_spare(study.find("int8-avx512"))
    assert spare is not None
    assert spare.name == "int8-dynamic"  # the smaller one is no pass, the smallest needs another library
    assert study.find_spare(study.find("fp32-onnx")) is None
    alone = study.model_copy(update={"judged": (study.find("int8-avx512"), study.find("int8-openvino"))})
    assert alone.find_spare(alone.find("int8-avx512")) is None


def test_spare_of_a_drop_in_is_one_too(forge: Forge) -> None:
    names = ["int8-avx512", "int8-dynamic", "fp32-onnx"]
    compatible = {f"cross_{task}_loss": measured(0.0) for task in ("ndcg_at_10", "recall_at_10")}
    runtimes = ["avx512", "onnxruntime", "onnxruntime"]
    candidates = [candidate(*each) for each in zip(names, (9, 24, 90), runtimes, strict=True)]
    found = speeds(dict.fromkeys([TORCH, *names], (100.0, 4.0)))
    for winner, expected in ((compatible, "fp32-onnx"), ({}, "int8-dynamic")):
        qualities = [quality(**winner), quality(), quality(**compatible)]
        judged = tuple(select.fn(candidates, qualities, found, GateLimits(), MODELS))
        study = forge.study.model_copy(update={"judged": judged})
        spare = study.find_spare(study.find("int8-avx512"))
        assert spare is not None
        assert spare.name == expected


def test_choose_of_nothing_is_nothing() -> None:
    assert choose([]) is None


@pytest.mark.parametrize(
    ("ndcg", "recall", "expected"),
    [
        (measured(0.0), measured(0.0), "drop-in"),
        (measured(0.01), measured(-0.2), "drop-in"),
        (measured(0.005, 0.006), measured(0.0), "reindex"),
        (measured(0.0), measured(0.011), "reindex"),
        (measured(0.0), None, "reindex"),
        (None, None, "reindex"),
        (measured(math.nan), measured(0.0), "reindex"),
        (Measurement(0.5, 0.0, 0.0), measured(0.0), "reindex"),
        (Measurement(0.0, -math.inf, 0.0), measured(0.0), "reindex"),
    ],
)
def test_compatibility_fails_closed(ndcg: Measurement | None, recall: Measurement | None, expected: str) -> None:
    given = {"cross_ndcg_at_10_loss": ndcg, "cross_recall_at_10_loss": recall}
    others = {name: loss for name, loss in given.items() if loss is not None}
    assert judge_compatibility(quality(**others)) == expected


def test_study_finds_a_candidate_by_name(forge: Forge) -> None:
    for name in NAMES:
        assert forge.study.find(name).name == name
    assert any(row.is_on_pareto_front for row in forge.study.judged)
