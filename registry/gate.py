"""The gate: thresholds in, verdict out. A pure function that fails closed; it reads nothing and writes nothing."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.manifest import SafeName, describe_validation

__all__ = [
    "Check",
    "CheckResult",
    "GateLimits",
    "GateRecord",
    "GateSettings",
    "Kind",
    "Measurement",
    "Verdict",
    "default_checks",
    "judge",
]

Kind = Literal["min", "max"]
Verdict = Literal["pass", "caution", "fail"]

_BADNESS: dict[Verdict, int] = {"pass": 0, "caution": 1, "fail": 2}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A metric's value and its 95 % interval, all in the metric's own unit."""

    value: float
    low: float
    high: float


class Check(_Record):
    """`metric` must be at least (`min`) or at most (`max`) `limit`; up to `caution_limit` a person may override."""

    metric: str = Field(min_length=1)
    kind: Kind
    limit: float
    caution_limit: float | None = None

    @model_validator(mode="after")
    def _caution_is_laxer(self) -> Self:
        if self.caution_limit is not None and _is_worse(self.limit, self.caution_limit, self.kind):
            side = "below" if self.kind == "min" else "above"
            raise ValueError(f"caution_limit {self.caution_limit} of a {self.kind} check must lie {side} {self.limit}")
        return self


class CheckResult(_Record):
    """How one check went. A number that was missing, NaN or infinite is None, and `reason` says so."""

    metric: str
    verdict: Verdict
    value: float | None
    low: float | None
    high: float | None
    bad_end: float | None
    limit: float
    caution_limit: float | None
    kind: Kind
    reason: str


class GateRecord(_Record):
    """The verdict, which is the worst of the checks', one sentence on it, and every check's result in order."""

    verdict: Verdict
    reason: str
    results: tuple[CheckResult, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the record: what an approval is bound to."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class GateLimits(_Record):
    """The default gate's thresholds: losses as a share of the teacher's score (0.01 = 1 %), ratios to the champion."""

    cosine_mean_pass: float = Field(default=0.99, ge=-1, le=1, description="mean cosine to the teacher that passes")
    cosine_mean_caution: float = Field(default=0.98, ge=-1, le=1, description="mean cosine below which it fails")
    min_engine_cosine: float = Field(
        default=0.999,
        ge=-1,
        le=1,
        description="least mean cosine of the engine that serves to what was judged: a tenth of the loss allowed above",
    )
    max_task_loss: float = Field(default=0.01, description="largest loss on a task, as a share of the teacher's score")
    max_champion_latency_ratio: float = Field(default=1.05, gt=0, description="most median latency over the champion's")
    min_champion_throughput_ratio: float = Field(default=0.95, gt=0, description="least throughput over the champion's")
    max_champion_p95_ratio: float = Field(default=1.5, gt=0, description="most 95th percentile over the champion's")
    max_champion_memory_ratio: float = Field(default=1.5, gt=0, description="most peak memory over the champion's")
    max_champion_task_loss: float = Field(
        default=0.01, description="largest loss on a task, as a share of the champion's score in the same run"
    )
    tasks: tuple[str, ...] = Field(default=("ndcg_at_10", "recall_at_10"), description="tasks whose loss is checked")

    @model_validator(mode="after")
    def _caution_is_below_pass(self) -> Self:
        if self.cosine_mean_caution > self.cosine_mean_pass:
            raise ValueError(
                f"cosine_mean_caution {self.cosine_mean_caution} is above cosine_mean_pass {self.cosine_mean_pass}"
            )
        return self


class GateSettings(GateLimits):
    """The limits, and for models by name the ones that differ."""

    models: dict[SafeName, dict[str, Any]] = Field(
        default={}, description="limits of single models: `[optimize.gate.models.<name>]` with any of the keys above"
    )

    @model_validator(mode="after")
    def _overrides_are_limits(self) -> Self:
        for name in self.models:
            try:
                self.for_model(name)
            except ValidationError as error:
                raise ValueError(f"models.{name}: {describe_validation(error)}") from None
        return self

    def for_model(self, name: str) -> GateLimits:
        """The limits that hold for a model."""
        return GateLimits.model_validate(self.model_dump(exclude={"models"}) | self.models.get(name, {}))


def default_checks(limits: GateLimits, with_sts: bool, with_champion: bool) -> tuple[Check, ...]:
    """The default gate: no non-finite output, cosine, task losses and, where there is a champion, the same against it.

    `engine_cosine_mean` ties what serves to what was judged: integer kernels that saturate, as on a processor without
    VNNI, would pass on the strength of exact arithmetic. It is 1 where the serving engine itself was judged.

    Losses are `<task>_loss` (and `sts_spearman_loss`) as a share of the teacher's score, `<task>_loss_vs_champion` as a
    share of the champion's; the ratios are candidate over champion, measured in one run.
    """
    tasks = (*limits.tasks, "sts_spearman") if with_sts else limits.tasks
    checks = [
        Check(metric="nonfinite", kind="max", limit=0),
        Check(
            metric="cosine_mean", kind="min", limit=limits.cosine_mean_pass, caution_limit=limits.cosine_mean_caution
        ),
        Check(metric="engine_cosine_mean", kind="min", limit=limits.min_engine_cosine),
        *(Check(metric=f"{task}_loss", kind="max", limit=limits.max_task_loss) for task in tasks),
    ]
    if with_champion:
        checks += [
            Check(metric="latency_ratio_vs_champion", kind="max", limit=limits.max_champion_latency_ratio),
            Check(metric="p95_ratio_vs_champion", kind="max", limit=limits.max_champion_p95_ratio),
            Check(metric="throughput_ratio_vs_champion", kind="min", limit=limits.min_champion_throughput_ratio),
            Check(metric="memory_ratio_vs_champion", kind="max", limit=limits.max_champion_memory_ratio),
            *(
                Check(metric=f"{task}_loss_vs_champion", kind="max", limit=limits.max_champion_task_loss)
                for task in limits.tasks
            ),
        ]
    return tuple(checks)


def judge(metrics: Mapping[str, Measurement], checks: Sequence[Check]) -> GateRecord:
    """Compare each check's metric with its limit by the interval's bad end: the low one of a min, the high of a max.

    Equal to the limit passes. A metric that is missing, not finite or inside out fails, and so does having no checks.
    """
    results = tuple(_judge_one(check, metrics.get(check.metric)) for check in checks)
    if not results:
        return GateRecord(verdict="fail", reason="no checks", results=())
    verdict = max((result.verdict for result in results), key=_BADNESS.__getitem__)
    if verdict == "pass":
        return GateRecord(verdict=verdict, reason=f"all {len(results)} checks pass", results=results)
    short = "; ".join(
        f"{name}: {', '.join(r.metric for r in results if r.verdict == name)}"
        for name in ("fail", "caution")
        if any(r.verdict == name for r in results)
    )
    return GateRecord(verdict=verdict, reason=short, results=results)


def _judge_one(check: Check, measurement: Measurement | None) -> CheckResult:
    if measurement is None:
        return _result(check, None, None, "fail", f"{check.metric} was not measured")
    # A NumPy float32 would compare, and print, in its own precision.
    measurement = Measurement(float(measurement.value), float(measurement.low), float(measurement.high))
    fault = _find_fault(check.metric, measurement)
    if fault is not None:
        return _result(check, measurement, None, "fail", fault)
    # A point outside its own interval counts too: an interval never excuses a worse value.
    ends = (measurement.value, measurement.low if check.kind == "min" else measurement.high)
    bad_end = min(ends) if check.kind == "min" else max(ends)
    if not _is_worse(bad_end, check.limit, check.kind):
        verdict: Verdict = "pass"
    elif check.caution_limit is not None and not _is_worse(bad_end, check.caution_limit, check.kind):
        verdict = "caution"
    else:
        verdict = "fail"
    return _result(check, measurement, bad_end, verdict, _explain(check, measurement, bad_end, verdict))


def _find_fault(metric: str, measurement: Measurement) -> str | None:
    numbers = {"value": measurement.value, "low end": measurement.low, "high end": measurement.high}
    wrong = [f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number)]
    if wrong:
        return f"{metric} is not a finite measurement: {', '.join(wrong)}"
    if measurement.low > measurement.high:
        return f"{metric} has its interval inside out: low {measurement.low:g} is above high {measurement.high:g}"
    return None


def _explain(check: Check, measurement: Measurement, bad_end: float, verdict: Verdict) -> str:
    """E.g. `ndcg_at_10_loss 0.0123 [0.0042, 0.0208]: bad end 0.0208 is over the limit 0.01 by 0.0108`."""
    value, low, high = (f"{number:.4g}" for number in (measurement.value, measurement.low, measurement.high))
    measured = f"{check.metric} {value} [{low}, {high}]: bad end {_format(bad_end, check.limit)}"
    if verdict == "pass":
        return f"{measured} is within the limit {check.limit:g}"
    side = "under" if check.kind == "min" else "over"
    missed = f"{measured} is {side} the limit {check.limit:g} by {abs(bad_end - check.limit):.3g}"
    if check.caution_limit is None:
        return missed
    if verdict == "caution":
        return f"{missed}, within the caution limit {check.caution_limit:g}"
    return f"{missed}, and {side} the caution limit {check.caution_limit:g}"


def _format(number: float, limit: float) -> str:
    """Four digits, or as many as it takes not to look equal to a limit it is not equal to."""
    texts = (f"{number:.{digits}g}" for digits in range(4, 18))
    return next(text for text in texts if number == limit or float(text) != limit)


def _is_worse(number: float, limit: float, kind: Kind) -> bool:
    return number < limit if kind == "min" else number > limit


def _result(
    check: Check, measurement: Measurement | None, bad_end: float | None, verdict: Verdict, reason: str
) -> CheckResult:
    return CheckResult(
        metric=check.metric,
        verdict=verdict,
        value=_finite(measurement.value) if measurement else None,
        low=_finite(measurement.low) if measurement else None,
        high=_finite(measurement.high) if measurement else None,
        bad_end=bad_end,
        limit=check.limit,
        caution_limit=check.caution_limit,
        kind=check.kind,
        reason=reason,
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
