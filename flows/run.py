"""Running `optimize` from a terminal: a table to read, one JSON document to parse."""

import json
import math
import sys
from typing import Any

from prefect.settings import PREFECT_TASKS_REFRESH_CACHE, temporary_settings
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from flows.config import OptimizeConfig
from flows.local_run import local_run
from flows.optimize import Outcome, optimize
from tasks.report import result_rows
from tasks.select import Judged

# What fits a terminal of 80 columns; the HTML report has the rest.
_COLUMNS = ("candidate", "verdict", "cosine", "nDCG loss %", "p50 ms", "texts/s", "× torch", "MB")
_STS = ("sts_spearman", "sts_spearman_loss")


def run_optimize(config: OptimizeConfig, refresh: bool = False) -> Outcome:
    """Run the flow in this process; with `refresh` no cached result is used."""
    with local_run(), temporary_settings({PREFECT_TASKS_REFRESH_CACHE: refresh}):
        return optimize(config)


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """The comparison table and what was published, or the same as one JSON document."""
    if as_json:
        sys.stdout.write(json.dumps(describe_outcome(outcome), allow_nan=False) + "\n")
        return
    console = Console()
    table = Table(
        *(Column(name, no_wrap=True) for name in _COLUMNS),
        title=f"{outcome.study.teacher.name} on {outcome.study.corpus_uri}",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for row in result_rows(outcome.study.judged):
        table.add_row(*(row[name] for name in _COLUMNS), style=None if row["verdict"] == "pass" else "dim")
    console.print(table)
    for name, why in outcome.study.explain().items():
        console.print(f"{name}: {why}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Rule: {outcome.study.rule}.", soft_wrap=True)
    published = outcome.published
    console.print(
        f"Published {published.name} {published.version}, digest {published.digest}"
        if published
        else "Published nothing.",
        soft_wrap=True,
    )
    if published:
        command = f"thorforge promote {published.digest[:12]} --model {published.name}"
        console.print(f"Put it into production: {command}", soft_wrap=True, highlight=False)
    console.print(f"Report: {outcome.report}", soft_wrap=True)
    console.print(f"Again: thorforge reproduce {outcome.run_id}", soft_wrap=True, highlight=False)


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON values: what the demo prints last."""
    published = outcome.published
    return {
        "model": outcome.study.teacher.name,
        "teacher_params": outcome.study.teacher.num_parameters,
        "candidates": [_describe_candidate(row) for row in outcome.study.judged],
        "not_built": outcome.study.not_built_reasons(),
        "published": {"digest": published.digest, "name": published.variant} if published else None,
        "report": str(outcome.report),
        "run": outcome.run_id,
    }


def _describe_candidate(row: Judged) -> dict[str, Any]:
    cosine = row.quality.metrics["cosine_mean"]
    return {
        "name": row.name,
        "engine": row.candidate.variant.runtime,
        "precision": row.candidate.variant.precision,
        "cosine_mean": _finite(cosine.value),
        "cosine_mean_ci": [_finite(cosine.low), _finite(cosine.high)],
        "cross_recall_at_10": row.quality.value("cross_recall_at_10"),
        "ndcg_at_10_loss": _finite(row.quality.value("ndcg_at_10_loss")),
        "p50_ms": row.speed.latency_ms(50),
        "p95_ms": row.speed.latency_ms(95),
        "throughput_per_s": row.speed.throughput_per_s,
        "speedup_vs_torch": row.speedup_vs_torch,
        **{name: _finite(row.quality.value(name)) for name in _STS if name in row.quality.metrics},
        "size_mb": row.size_mb,
        "cost_per_million": row.cost_per_million,
        "verdict": row.gate.verdict,
        "compatibility": row.compatibility,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN: null for the cosine of what is not finite, and a loss against a teacher that scores nothing."""
    return value if value is not None and math.isfinite(value) else None
