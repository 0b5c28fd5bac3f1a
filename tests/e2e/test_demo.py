"""What `make demo` runs, twice, and what it promises on its last line."""

import json
import sys
from typing import Any

import pytest

from tasks.measurement.hardware import INT8_FLAGS, cpu_flags
from tests.e2e.conftest import Project

pytestmark = pytest.mark.e2e

CANDIDATE_KEYS = {
    "name", "engine", "precision", "cosine_mean", "cosine_mean_ci", "cross_recall_at_10", "ndcg_at_10_loss", "p50_ms",
    "p95_ms", "throughput_per_s", "speedup_vs_torch", "size_mb", "cost_per_million", "verdict", "compatibility",
}  # fmt: skip


def run_demo(project: Project) -> dict[str, Any]:
    """The demo's JSON document."""
    done = project.run(sys.executable, "-m", "flows.demo")
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def test_demo_publishes_and_serves_a_bundle_that_passes(project: Project) -> None:
    first = run_demo(project)
    assert first["ok"] is True
    assert first["model"] == "all-MiniLM-L6-v2"
    assert 22.5e6 < first["teacher_params"] < 22.8e6
    assert {frozenset(candidate) for candidate in first["candidates"]} == {frozenset(CANDIDATE_KEYS)}
    passing = [c["precision"] for c in first["candidates"] if c["verdict"] == "pass" and c["cosine_mean"] >= 0.99]
    exact = bool(INT8_FLAGS & set(cpu_flags()))  # otherwise integers saturate, and the gate lets none of them pass
    assert ("int8" in passing) == exact
    assert first["worker"]["cosine_vs_teacher"] >= 0.99
    assert first["peak_memory_mb"] <= 4096 * 1.048576

    second = run_demo(project)
    assert second["published"] == first["published"]
    assert second["candidates"] == first["candidates"]
