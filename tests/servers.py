"""Real servers for tests, each a process of its own on a free port of this machine."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_START_SECONDS = 300  # on a machine that is busy with other things
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class PrefectServer:
    """A running Prefect server."""

    api_url: str
    ui_url: str


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def run_process(
    command: list[str], env: Mapping[str, str], folder: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A background process, in `folder`, that is terminated at the end of the block."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=dict(env), cwd=folder, stdout=quiet, stderr=quiet) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once `url` answers 200; fail when the process ends or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server of {url} ended with {process.returncode}"
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(_POLL_SECONDS)
    raise AssertionError(f"{url} did not answer within {_START_SECONDS} s")


@contextmanager
def run_prefect_server(env: Mapping[str, str], port: int) -> Iterator[PrefectServer]:
    """`prefect server start` on `port`."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    api_url = f"http://127.0.0.1:{port}/api"
    # Or its pages would ask port 4200.
    with run_process(command, {**env, "PREFECT_SERVER_UI_API_URL": api_url}) as process:
        wait_until_answers(f"{api_url}/health", process)
        yield PrefectServer(api_url, f"http://127.0.0.1:{port}")


@contextmanager
def run_mlflow_server(tracking_uri: str, env: Mapping[str, str], port: int, *options: str) -> Iterator[str]:
    """`mlflow server` on `port` over a database; yields its URL."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", *options]
    # Its job runners are seven more processes, for evaluations of chat traces.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with run_process(command, {**env, **quiet}) as process:
        wait_until_answers(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def run_postgres(port: int) -> Iterator[str]:
    """A new PostgreSQL cluster on `port`, without durability; yields the URI of an empty database.

    The server refuses to run as root, so then it runs as Debian's own user for it.
    """
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="thorforge-postgres-"))
    if user:
        shutil.chown(folder, user)
    try:
        make = [
            find_postgres("initdb"),
            "--pgdata",
            str(folder),
            "--username",
            "mlflow",
            "--auth",
            "trust",
            "--no-sync",
        ]
        subprocess.run(make, check=True, user=user, cwd="/", capture_output=True)
        serve = [find_postgres("postgres"), "-D", str(folder), "-p", str(port), "-k", str(folder), "-F"]
        with subprocess.Popen(
            serve, user=user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                _wait_until_listens(port, process)
                yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
            finally:
                process.terminate()
                process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_postgres(program: str) -> str:
    """A program of PostgreSQL; Debian keeps them out of the path, by version."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    path = str(found[-1]) if found else shutil.which(program)
    assert path, f"{program} of PostgreSQL is not installed: python -m tests.e2e.prepare"
    return path


def _wait_until_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server on port {port} ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(_POLL_SECONDS)
    raise AssertionError(f"nothing listens on port {port} after {_START_SECONDS} s")
