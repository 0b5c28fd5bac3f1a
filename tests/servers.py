"""Real servers for tests, each a process of its own on a free port of this machine."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

_START_SECONDS = 120
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
def run_process(command: list[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A background process that is terminated at the end of the block."""
    with subprocess.Popen(command, env=dict(env), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
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
def run_mlflow_server(tracking_uri: str, env: Mapping[str, str], port: int) -> Iterator[str]:
    """`mlflow server` on `port` over an existing database; yields its URL."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with run_process(command, {**env, "MLFLOW_DISABLE_TELEMETRY": "true"}) as process:
        wait_until_answers(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
