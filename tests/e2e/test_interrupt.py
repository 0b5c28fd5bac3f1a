"""A run that is interrupted or killed: nothing half-written, the truth in MLflow, and the next run resumes."""

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.e2e.conftest import NAME, ROOT, Project, make_project
from tests.forge import write_corpus

pytestmark = pytest.mark.e2e

_STEP_SECONDS = 300


@pytest.fixture
def own_project(tmp_path: Path) -> Project:
    """State of its own: the shared one must not see killed runs."""
    return make_project(tmp_path)


def interrupt(project: Project, number: signal.Signals, corpus: Path, log: Path, step: str) -> int:
    """Start optimize, send the signal once `step` shows in the log, and return the exit status."""
    command = [sys.executable, "-c", "from flows.cli import main; main()"]
    command += ["optimize", "--name", NAME, "--corpus", str(corpus)]
    with (
        log.open("w") as stream,
        subprocess.Popen(command, cwd=ROOT, env=project.env, stdout=stream, stderr=subprocess.STDOUT) as process,
    ):
        deadline = time.monotonic() + _STEP_SECONDS
        while step not in log.read_text() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(number)
        return process.wait(_STEP_SECONDS)


def statuses(project: Project) -> list[str]:
    """States of the parent runs, oldest first."""
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("optimize")
    assert experiment is not None
    return [run.info.status for run in client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])]


def flow_states(project: Project) -> list[str]:
    """States of the Prefect flow runs, oldest first."""
    with closing(sqlite3.connect(project.folder / "prefect" / "prefect.db")) as database:
        return [state for (state,) in database.execute("select state_type from flow_run order by created")]


def servers_of(project: Project) -> int:
    """Temporary Prefect servers of this project that are alive."""
    count = 0
    for process in psutil.process_iter():
        try:
            own = process.environ().get("THORFORGE_HOME") == str(project.folder)
            count += own and "uvicorn" in " ".join(process.cmdline())
        except psutil.Error:
            continue
    return count


@pytest.mark.filterwarnings("default")
def test_interrupted_runs_are_closed_and_the_next_one_resumes(own_project: Project, tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path / "corpus.jsonl", 1500), tmp_path / "log"
    assert interrupt(own_project, signal.SIGINT, *inputs, "'export' - Finished") == 130
    assert statuses(own_project) == ["KILLED"]
    assert servers_of(own_project) == 0

    assert interrupt(own_project, signal.SIGTERM, *inputs, "'quantize-int8-dynamic' - Finished") == 130
    assert statuses(own_project) == ["KILLED", "KILLED"]

    assert interrupt(own_project, signal.SIGKILL, *inputs, "embed teacher:") == -signal.SIGKILL
    assert statuses(own_project)[-1] == "RUNNING"
    assert servers_of(own_project) == 1
    assert not (own_project.folder / "registry").exists()

    document = own_project.optimize("--variant", "fp32-onnx", "--corpus", str(inputs[0]))
    assert document["published"]["name"] == "fp32-onnx"
    assert statuses(own_project)[:3] == ["KILLED"] * 3
    assert flow_states(own_project) == ["CRASHED", "CRASHED", "CRASHED", "COMPLETED"]
    assert servers_of(own_project) == 0
    assert not list((own_project.folder / "artifacts").glob(".teacher-*"))
