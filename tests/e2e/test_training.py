"""Training as processes: several of them (torchrun, here over gloo on the CPU), and one that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.corpus import build_corpus, corpus_fingerprint
from tasks.distillation.teach import run_distributed
from tasks.models.teacher import load_teacher
from tasks.steps import Training
from tests.forge import write_corpus
from tests.tasks.test_distill import STEPS, make_job
from tests.teachers import make_teacher

# As a task of a run does it, and how many steps this process made itself.
DISTIL = """
import json, sys
from tasks.corpus import build_corpus, corpus_fingerprint
from tasks.distill import distill
from tasks.distillation.training import TeachingLoss
from tasks.models.teacher import load_teacher
from tasks.steps import DistillConfig, read_step

forward, steps = TeachingLoss.forward, []
TeachingLoss.forward = lambda self, *inputs: steps.append(1) or forward(self, *inputs)
folder, uri = sys.argv[1:]
teacher = load_teacher.fn(folder)
corpus = build_corpus.fn(uri, (), corpus_fingerprint(uri))
made = distill.fn(teacher, teacher, DistillConfig(depth=1, epochs=6, batch_size=8, learning_rate=2e-3), corpus)
print(json.dumps({"digest": made.digest, "steps": len(steps), "told": read_step(made.folder).details["num_steps"]}))
"""
KILL_SECONDS = 1800


def start_distil(state: Path, *inputs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DISTIL, *map(str, inputs)]
    return subprocess.Popen(
        command, env={**os.environ, "THORFORGE_HOME": str(state)}, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, _ = process.communicate(timeout=KILL_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0
    return dict(json.loads(out.splitlines()[-1]))


@pytest.mark.e2e
def test_training_that_is_killed_goes_on_to_the_same_model(tmp_path: Path) -> None:
    inputs = make_teacher(tmp_path / "tiny", layers=2), write_corpus(tmp_path / "corpus.jsonl", 700)
    whole = finish(start_distil(tmp_path / "whole", *inputs))
    assert whole["steps"] == whole["told"] > 40

    state = tmp_path / "killed"
    process = start_distil(state, *inputs)
    deadline = time.monotonic() + KILL_SECONDS
    # The second is begun: the first is whole.
    while len(list(state.glob("training/*/checkpoint-*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(state.glob("artifacts/distill-*"))

    resumed = finish(start_distil(state, *inputs))
    assert resumed["steps"] < whole["steps"]
    assert (resumed["told"], resumed["digest"]) == (whole["told"], whole["digest"])  # weights, curve and all
    assert not list(state.glob("training/*"))


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
