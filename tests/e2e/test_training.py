"""Training in several processes: torchrun, here over gloo on the CPU."""

import json
from pathlib import Path

import pytest

from tasks.corpus import build_corpus, corpus_fingerprint
from tasks.steps import Training
from tasks.teach import run_distributed
from tasks.teacher import load_teacher
from tests.forge import write_corpus
from tests.tasks.test_distill import STEPS, make_job
from tests.teachers import make_teacher


@pytest.mark.e2e
def test_training_in_two_processes_learns_and_leaves_one_result(tmp_path: Path) -> None:
    teacher = load_teacher.fn(str(make_teacher(tmp_path / "tiny", layers=3)))
    uri = str(write_corpus(tmp_path / "corpus.jsonl", 700))
    corpus = build_corpus.fn(uri, (), corpus_fingerprint(uri))
    job = make_job(tmp_path / "job", teacher, corpus, Training(batch_size=8, learning_rate=2e-3))
    run_distributed(job, 2)
    result = json.loads((job / "result.json").read_text())
    assert result["num_steps"] == STEPS
    assert len(result["curve"]) == STEPS
    assert (job / "trained" / "model.safetensors").is_file()
