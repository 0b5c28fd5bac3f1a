"""From what a load saw to benchmark rows: figures of each system, set beside the baseline's of the same run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.load import LoadResult, Times
from benchmarks.rows import make_row

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. `baseline` is a figure of the same run where the baseline is not the peer's of the same name."""

    system: str
    case: str
    metric: str
    unit: str
    value: float
    details: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    baseline: tuple[str, float] | None = None


def percentiles(values: Times) -> dict[str, float]:
    """`p50`, `p95` and `p99`; empty where there are no values."""
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES} if len(values) else {}


def median_rate(runs: Sequence[LoadResult]) -> float:
    """Requests a second: the median of the rounds."""
    return float(np.median([run.requests_per_s for run in runs]))


def summarise(system: str, case: str, runs: Sequence[LoadResult], config: Mapping[str, Any]) -> list[Figure]:
    """Rate, latencies of all rounds together, and failures; `config` also gets what the generator itself took."""
    latencies = percentiles(np.concatenate([run.latencies_ms() for run in runs]))
    own = {
        "rounds_per_s": [round(run.requests_per_s, 2) for run in runs],
        "client_cpu_us": round(
            1e6 * sum(run.cpu_seconds for run in runs) / max(1, sum(len(run.due) for run in runs)), 1
        ),
        "client_late_p99_ms": round(max((float(np.percentile(run.lateness_ms, 99)) for run in runs), default=0.0), 3),
    }
    config = {**config, **own}
    return [
        Figure(system, case, "requests_per_s", "1/s", median_rate(runs), details=latencies, config=config),
        *(Figure(system, case, f"{name}_ms", "ms", value, config=config) for name, value in latencies.items()),
        Figure(system, case, "failed", "", float(sum(run.num_failed for run in runs)), config=config),
    ]


def to_rows(figures: Sequence[Figure], baseline: str | None, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run; every figure but the baseline's own is compared with the baseline's where that has one."""
    values = {(figure.system, figure.case, figure.metric): figure.value for figure in figures}
    return [_to_row(figure, values, baseline, run) for figure in figures]


def _to_row(
    figure: Figure, values: Mapping[tuple[str, str, str], float], baseline: str | None, run: Mapping[str, Any]
) -> dict[str, Any]:
    compared: dict[str, Any] = {}
    if figure.baseline is not None:
        compared = {"baseline": figure.baseline[0], "baseline_value": figure.baseline[1]}
    elif baseline not in (None, figure.system) and (found := values.get((str(baseline), figure.case, figure.metric))):
        compared = {"baseline": baseline, "baseline_value": found}
    config = {**run, **figure.config}
    return make_row(
        "serving", figure.case, figure.metric, figure.unit, figure.value,
        system=figure.system, config=config, **figure.details, **compared,
    )  # fmt: skip
