"""The same flow on a Dask scheduler with two worker processes, one of which is killed in the middle."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Project, make_project
from tests.forge import write_corpus
from tests.servers import PrefectServer, free_port, run_prefect_server, run_process

pytestmark = pytest.mark.e2e

VARIANTS = ("fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino", "student", "shorter")
# Two trainings that do not depend on one another, and a step after one of them.
RECIPES = """
[[optimize.recipe]]
name = "student"
build = "fp32-onnx"
steps = [{ kind = "distill", depth = 1 }]

[[optimize.recipe]]
name = "shorter"
build = "fp32-onnx"
steps = [{ kind = "distill", depth = 1, seed = 1 }, { kind = "trim", ratio = 0.1 }]
"""
SECONDS = 900
# A scheduler that gets no processor for half a minute is not a lost one.
PATIENCE = {f"DASK_DISTRIBUTED__COMM__TIMEOUTS__{name}": "300s" for name in ("CONNECT", "TCP")}
Workers = dict[str, subprocess.Popen[bytes]]


@contextmanager
def dask(project: Project, server: PrefectServer) -> Iterator[tuple[str, Workers]]:
    """A scheduler and two workers, by name, with what every worker of a real cluster needs: state folder and API."""
    env = project.env | {"PREFECT_API_URL": server.api_url} | PATIENCE
    address = f"tcp://127.0.0.1:{free_port()}"
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--host", address]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
    worker += ["--no-dashboard", "--local-directory", str(project.folder / "dask"), "--name"]
    with (
        run_process(scheduler, env),
        run_process([*worker, "one"], env) as one,
        run_process([*worker, "two"], env) as two,
    ):
        yield address, {"one": one, "two": two}


def wait_for_workers(address: str, count: int) -> None:
    from distributed import Client

    with Client(address, timeout=SECONDS, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=SECONDS)


def kill_a_busy_worker(address: str, workers: Workers, run: subprocess.Popen[bytes]) -> None:
    """Once both workers have had a training at the same time, kill one of them."""
    from distributed import Client

    with Client(address, timeout=SECONDS, set_as_default=False) as client:
        names = {at: str(worker["name"]) for at, worker in client.scheduler_info()["workers"].items()}
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            assert run.poll() is None, "the run ended before both workers were training"
            busy = {names[at]: tasks for at, tasks in client.processing().items() if tasks}
            if busy.keys() == workers.keys() and all(
                key.startswith("distill") for keys in busy.values() for key in keys
            ):
                workers["one"].send_signal(signal.SIGKILL)
                return
            time.sleep(0.05)
    raise AssertionError(f"the workers were never training both, last seen: {busy}")


def test_killed_dask_worker_costs_a_retry_and_not_the_run(tiny_teacher: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "state")
    (project.folder / "prefect").mkdir(parents=True)
    corpus = write_corpus(tmp_path / "corpus.jsonl", 240)
    command = [
        sys.executable,
        "-c",
        "from flows.cli import main; main()",
        "optimize",
        "--json",
        "--model",
        str(tiny_teacher),
    ]
    settings = tmp_path / "recipes.toml"
    settings.write_text(RECIPES)
    command += ["--corpus", str(corpus), "--calibration-size", "8", "--config", str(settings)]
    command += [word for name in VARIANTS for word in ("--variant", name)]
    with run_prefect_server(project.env, free_port()) as server, dask(project, server) as (address, workers):
        wait_for_workers(address, 2)
        env = project.env | {"PREFECT_API_URL": server.api_url} | PATIENCE
        out, err = tmp_path / "out", tmp_path / "err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            run = subprocess.Popen([*command, "--dask-scheduler", address], env=env, stdout=stdout, stderr=stderr)
            kill_a_busy_worker(address, workers, run)
            code = run.wait(SECONDS)
    # 3: everything was built and judged, and the random teacher's gate passed nothing.
    assert code in (0, 3), err.read_text()[-3000:]
    document = json.loads(out.read_text().splitlines()[-1])
    assert {row["name"] for row in document["candidates"]} == set(VARIANTS)
    assert [worker.returncode for worker in workers.values()].count(-signal.SIGKILL) == 1
