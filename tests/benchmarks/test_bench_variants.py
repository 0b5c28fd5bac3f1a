"""Rows of bench_variants, made of the tiny teacher's study."""

import gzip
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_variants import collect_sentences, describe_making, quality_rows, retrieval_rows, speed_rows
from flows.optimize import Outcome
from registry.gate import Measurement
from tasks.corpus import read_retrieval
from tasks.evaluate import rank_scores, relevant_columns
from tests.forge import Forge

NOTHING = Measurement(0.0, 0.0, 0.0)
COMMON = {"baseline": "fp32-torch", "config": {"corpus": "test"}}


def test_bench_variants_sentences_are_those_of_every_file_each_once(tmp_path: Path) -> None:
    for name, lines in (("a", "one\ntwo\n\n"), ("b", "two\nthree\n")):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(lines.encode()))
    corpus = collect_sentences(tmp_path, tmp_path / "bench" / "sentences.txt")
    assert corpus.read_text() == "one\ntwo\nthree\n"


def score_teacher(forge: Forge) -> dict[str, float]:
    """What the teacher's own embeddings find."""
    retrieval = read_retrieval(forge.study.corpus)
    assert retrieval is not None
    queries, documents = (np.load(forge.teacher_embeddings.folder / f"{name}.npy") for name in ("queries", "documents"))
    scores = rank_scores(queries, documents, relevant_columns(retrieval))
    return {name: float(values.mean()) for name, values in scores.items()}


def test_bench_variants_rows_hold_quality_size_and_speed_beside_the_teachers(forge: Forge) -> None:
    judged = forge.study.find("fp32-onnx")
    rows = {row["metric"]: row for row in quality_rows(judged, forge.study.teacher, COMMON)}
    assert {"size_mb", "params", "encoder_params", "cosine_mean", "ndcg_at_10", "cross_recall_at_10"} <= rows.keys()
    assert rows["params"]["value"] == forge.study.teacher.num_parameters
    assert rows["ndcg_at_10"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert rows["ndcg_at_10"]["baseline_value"] == pytest.approx(score_teacher(forge)["ndcg_at_10"])
    assert rows["params"]["ratio"] == rows["encoder_params"]["ratio"] == rows["cosine_mean"]["baseline_value"] == 1
    assert rows["size_mb"]["ratio"] == pytest.approx(1, abs=0.5)  # the same weights, and a graph
    without = {row["metric"] for row in rows.values() if "ratio" not in row}
    assert without == {name for name in rows if name.endswith("_loss")} | {"nonfinite"}  # of which the teacher has none
    assert {row["case"] for row in rows.values()} == {"fp32-onnx"}
    speeds = {row["metric"]: row for row in speed_rows(judged, forge.study.speeds, COMMON)}
    assert speeds["throughput_per_s"]["ratio"] == pytest.approx(judged.speedup_vs_torch)


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_bench_variants_rows_of_a_candidate_that_finds_nothing_have_no_baseline(loss: float, forge: Forge) -> None:
    judged = forge.study.find("fp32-onnx")
    metrics = judged.quality.metrics | {"ndcg_at_10": NOTHING, "ndcg_at_10_loss": Measurement(loss, loss, loss)}
    judged = judged.model_copy(update={"quality": judged.quality.model_copy(update={"metrics": metrics})})
    rows = {row["metric"]: row for row in quality_rows(judged, forge.study.teacher, COMMON)}
    assert rows["ndcg_at_10"]["value"] == 0
    assert not {"baseline_value", "ratio"} & rows["ndcg_at_10"].keys()


def test_bench_variants_rows_say_what_makes_them_again(forge: Forge, tmp_path: Path) -> None:
    outcome = Outcome(study=forge.study, published=None, report=tmp_path / "report.html", run_id="0123abcd")
    arguments = Namespace(data=Path("../some data"), quality_only=True)
    judged = forge.study.find("int8-static")
    told = describe_making(judged, outcome, arguments)
    command = "python -m benchmarks.bench_variants --variant int8-static --data '../some data' --quality-only"
    assert (told["command"], told["run"]) == (command, "0123abcd")
    assert (told["recipe"]["build"], told["recipe"]["qdq"]["calibration"]) == ("int8-static", "minmax")
    assert told["digests"] == {
        "teacher": forge.study.teacher.digest,
        "corpus": forge.study.corpus.digest,
        "int8-static": judged.candidate.artifact.digest,
    }


def test_bench_variants_judges_every_candidate_on_a_beir_folder(forge: Forge) -> None:
    folder = forge.study.corpus.folder / "retrieval"
    study = forge.study.model_copy(update={"judged": forge.study.judged[:1]})
    rows = {row["metric"]: row for row in next(retrieval_rows(study, folder, COMMON))}
    assert rows.keys() == {"ndcg_at_10", "recall_at_10", "cross_ndcg_at_10", "cross_recall_at_10"}
    expected = study.judged[0].quality
    for metric, row in rows.items():
        assert row["value"] == pytest.approx(expected.value(metric), abs=1e-6)
        assert row["config"]["judged_on"] == "retrieval"
