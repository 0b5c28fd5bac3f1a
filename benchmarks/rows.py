"""Benchmark rows: one JSON object a measurement, appended, never edited."""

import json
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from tasks.measurement.libraries import library_versions

RESULTS = Path(__file__).parent / "results"


def make_row(bench: str, case: str, metric: str, unit: str, value: float, **extra: Any) -> dict[str, Any]:
    """A row with hardware, versions, commit and date; `extra` may hold system, p50, p95, p99, baseline, config.

    It may also bring hardware, versions and commit of its own: of a GPU, of a machine that has no checkout.
    """
    baseline = extra.get("baseline_value")
    if "versions" not in extra:
        extra["versions"] = library_versions()
    return {
        "bench": bench,
        "system": "thorforge",
        "case": case,
        "metric": metric,
        "unit": unit,
        "value": value,
        **extra,
        **({"ratio": value / baseline} if baseline else {}),
        "hardware": extra.get("hardware") or _describe_hardware(),
        "commit": extra.get("commit") or _describe_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append_rows(bench: str, rows: list[dict[str, Any]], out: Path | None = None) -> Path:
    """Append `rows` to results/<bench>.jsonl, or to `out`; returns the path."""
    path = out or RESULTS / f"{bench}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    return path


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One JSON document, on one line of stdout."""
    print(json.dumps(rows, sort_keys=True))


def _describe_hardware() -> str:
    from tasks.measurement.hardware import describe_hardware  # noqa: PLC0415  it needs what the worker needs

    return describe_hardware()


@cache
def _describe_commit() -> str:
    """The checkout's commit, marked where the tree has changes; `unknown` outside a checkout."""
    describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
