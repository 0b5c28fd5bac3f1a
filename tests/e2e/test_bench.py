"""The serving benchmark from end to end, in a few seconds: does it run, and does it say what it promises?"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import render_table
from tests.e2e.conftest import Project

pytestmark = pytest.mark.e2e

CASES = ("closed-1", "closed-32", "batch-32", "open-80", "overhead", "overload-3x", "footprint")


def test_serving_benchmark_measures_worker_and_peer_in_one_run(project: Project, fp32_bundle: Path) -> None:
    bench = [sys.executable, "-m", "benchmarks.bench_serving", "--bundle", str(fp32_bundle)]
    options = ["--peer", "sentence-transformers", "--quick", "--no-rows", "--soak", "200", "--cases", *CASES]
    done = project.run(*bench, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    table, _, last = done.stdout.rstrip().rpartition("\n")
    rows: list[dict[str, Any]] = json.loads(last)
    assert table == render_table(rows)
    found = {(row["case"], row["metric"]) for row in rows if row["system"] == "thorforge"}
    for case in ("closed-1", "closed-32", "batch-32", "open-80"):
        assert {(case, metric) for metric in ("requests_per_s", "p50_ms", "p95_ms", "p99_ms", "failed")} <= found
    assert {("overload-3x", "goodput_share"), ("overhead", "requests_per_s"), ("soak", "resident_mb")} <= found
    assert {("footprint", metric) for metric in ("cold_start_s", "resident_mb", "installed_mb")} <= found
    assert [row["value"] for row in rows if row["metric"] == "failed"] == [0] * 10
    assert all(row["value"] > 0.99 for row in rows if row["case"] == "agreement")
    peer = {row["case"] for row in rows if row["system"].startswith("sentence-transformers-")}
    assert peer == {"agreement", "closed-1", "closed-32", "batch-32", "open-80", "footprint"}
