"""`make ui` as a process: both pages answer, and whatever ends it leaves no server behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import ROOT, make_project
from tests.servers import free_port, wait_until_answers

pytestmark = pytest.mark.e2e

_END_SECONDS = 60
_LEAVE_SECONDS = 10


@dataclass(frozen=True)
class Ui:
    """A started `make ui` and its ports."""

    process: subprocess.Popen[bytes]
    mlflow_port: int
    prefect_port: int


@contextmanager
def start_ui(folder: Path, mlflow_port: int) -> Iterator[Ui]:
    """Both servers over a new state folder, in a session of their own as a terminal would have it."""
    prefect_port = free_port()
    (folder / "mlflow").mkdir(parents=True)
    ports = ["--mlflow-port", str(mlflow_port), "--prefect-port", str(prefect_port)]
    command = [sys.executable, "-m", "flows.ui", *ports]
    env = make_project(folder).env
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield Ui(process, mlflow_port, prefect_port)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def session_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The living processes in the session of `process`."""
    found = []
    for other in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
    return found


def survivors(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What is left of the session after a moment to leave."""
    psutil.wait_procs(session_of(process), _LEAVE_SECONDS)
    return session_of(process)


@pytest.mark.parametrize("how", ["ctrl-c", "terminate"])
def test_ui_shows_both_pages_until_it_is_ended(how: str, tmp_path: Path) -> None:
    with start_ui(tmp_path / "state", free_port()) as ui:
        wait_until_answers(f"http://127.0.0.1:{ui.mlflow_port}/health", ui.process)
        wait_until_answers(f"http://127.0.0.1:{ui.prefect_port}/api/health", ui.process)
        for port, title in ((ui.mlflow_port, "<title>MLflow</title>"), (ui.prefect_port, "<title>Prefect Server")):
            page = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, follow_redirects=True)
            assert title in page.text
        settings = httpx.get(f"http://127.0.0.1:{ui.prefect_port}/ui-settings", trust_env=False).json()
        assert settings["api_url"] == f"http://127.0.0.1:{ui.prefect_port}/api"
        assert len(session_of(ui.process)) >= 3
        if how == "ctrl-c":
            os.killpg(ui.process.pid, signal.SIGINT)  # a terminal signals every process in the foreground
        else:
            ui.process.terminate()
        ui.process.communicate(timeout=_END_SECONDS)
        assert ui.process.returncode == 0
        assert survivors(ui.process) == []


def test_ui_ends_both_servers_when_one_cannot_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, start_ui(tmp_path / "state", taken.getsockname()[1]) as ui:
        _, said = ui.process.communicate(timeout=2 * _END_SECONDS)
        assert ui.process.returncode == 1
        assert b"error: a server ended" in said
        assert survivors(ui.process) == []
