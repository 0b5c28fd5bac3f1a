"""The servers that are measured: how each is started, asked and held still while another has its turn."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import Distribution, PathDistribution, version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray

from registry.manifest import read_manifest
from serving.config import ENV_PREFIX

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers"
THORFORGE, INFINITY, SENTENCE_TRANSFORMERS = "thorforge", "infinity", "sentence-transformers"
ADMIN_TOKEN = "benchmark"  # noqa: S105  of a worker that listens on this machine only, for the length of a run
_START_SECONDS = 120.0
_POLL_SECONDS = 0.01
_REQUEST_SECONDS = 60.0
_STOP_SECONDS = 30.0
_HOLD_SECONDS = 5.0


class ServerFailed(Exception):
    """A server did not start, is not installed, or answers what it should not."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """A server to start: its name in the rows, the model's name in requests, its command for a port, its cores."""

    name: str
    model: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cores: frozenset[int] = frozenset()
    """Empty: all."""


@dataclass(slots=True)
class Server:
    """A server that answers; `process` is None where somebody else started it."""

    name: str
    base_url: str
    model: str
    process: subprocess.Popen[bytes] | None = None
    cold_start_seconds: float | None = None

    @property
    def url(self) -> str:
        """Where embeddings are asked for, in OpenAI's dialect."""
        return f"{self.base_url}/v1/embeddings"

    def body(self, texts: str | list[str]) -> dict[str, Any]:
        """The request's JSON document."""
        return {"model": self.model, "input": texts, "encoding_format": "float"}

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors of `texts`, float32 [N, D]. Raises ServerFailed."""
        try:
            reply = httpx.post(self.url, json=self.body(texts), timeout=_REQUEST_SECONDS, trust_env=False)
            rows = reply.raise_for_status().json()["data"]
            return np.array([row["embedding"] for row in rows], dtype=np.float32)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServerFailed(f"{self.name} at {self.url} does not embed: {type(error).__name__}: {error}") from None

    def resident_mb(self) -> float | None:
        """Memory of the process and its children, 10^6 bytes; None where we did not start it."""
        if self.process is None:
            return None
        own = psutil.Process(self.process.pid)
        return float(sum(process.memory_info().rss for process in [own, *own.children(recursive=True)])) / 1e6

    def pause(self) -> None:
        """Stop it where it is, so that it takes no processor time from another's turn; returns once it stands."""
        self._signal(signal.SIGSTOP)
        deadline = time.perf_counter() + _HOLD_SECONDS  # the signal is delivered some time after it was sent
        while self._is_running() and time.perf_counter() < deadline:
            time.sleep(_POLL_SECONDS)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _is_running(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            return False
        return psutil.Process(self.process.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def thorforge_spec(
    bundle: Path,
    root: Path | None = None,
    cores: frozenset[int] = frozenset(),
    http_processes: int = 0,
    max_batch_size: int = 0,
) -> ServerSpec:
    """Our worker on `bundle`, from this very environment; with `root` it may be told to serve bundles below it.

    A `max_batch_size` of 0 leaves the worker its own.
    """
    command = (
        sys.executable,
        "-m",
        "serving",
        "--bundle",
        str(bundle),
        "--drain-grace-seconds",
        "0",
        "--http-processes",
        str(http_processes),
        "--port",
        "{port}",
    )
    env = {f"{ENV_PREFIX}MODELS_ROOT": str(root), f"{ENV_PREFIX}SECURITY_ADMIN_TOKENS": ADMIN_TOKEN} if root else {}
    if max_batch_size:
        env[f"{ENV_PREFIX}BATCHING_MAX_BATCH_SIZE"] = str(max_batch_size)
    return ServerSpec(THORFORGE, read_manifest(bundle).model_name, command, env, cores)


def pin(cores: frozenset[int]) -> Callable[[], None] | None:
    """What a child calls before it starts, to run on `cores` alone; None: no core is named, it runs on all."""
    return partial(os.sched_setaffinity, 0, cores) if cores else None


def peer_spec(name: str, model_folder: Path) -> ServerSpec:
    """A peer by name, on the teacher's own folder. Raises ServerFailed for one that is not installed."""
    if name == SENTENCE_TRANSFORMERS:
        own = (sys.executable, "-m", "benchmarks.sentence_transformers_server", str(model_folder), "{port}")
        return ServerSpec(f"{name}-{version(name)}", "model", own)
    program = PEERS / "bin" / "infinity_emb"
    if not program.is_file():
        raise ServerFailed(f"{program} is missing: make peers installs it")
    (found,) = [d for d in find_distributions(PEERS) if d.name.replace("_", "-") == "infinity-emb"]
    command = (
        str(program), "v2", "--model-id", str(model_folder), "--served-model-name", "model", "--engine", "torch",
        "--device", "cpu", "--url-prefix", "/v1", "--host", "127.0.0.1", "--port", "{port}",
    )  # fmt: skip
    quiet = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    return ServerSpec(f"{name}-{found.version}", "model", command, quiet)


def find_distributions(venv: Path) -> list[Distribution]:
    """What is installed in a virtual environment."""
    folders = venv.glob("lib/python3*/site-packages/*.dist-info")
    return [PathDistribution(folder) for folder in sorted(folders)]


@contextmanager
def start_server(spec: ServerSpec) -> Iterator[Server]:
    """Start a server, wait for its first answer and end it afterwards. Raises ServerFailed."""
    port = _free_port()
    command = [part.format(port=port) for part in spec.command]
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(spec.env),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=pin(spec.cores),  # noqa: PLW1509  a system call, which waits for no thread
        ) as process,
    ):
        server = Server(spec.name, f"http://127.0.0.1:{port}", spec.model, process)
        try:
            if not _wait_for_answer(server, process):
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise ServerFailed(f"{spec.name} did not answer within {_START_SECONDS:g} s: {said}")
            server.cold_start_seconds = time.perf_counter() - started
            yield server
        finally:
            server.resume()
            _end(process)


def attach_server(name: str, base_url: str) -> Server:
    """A server that somebody else started, by its base URL. Raises ServerFailed."""
    try:
        reply = httpx.get(f"{base_url}/v1/models", timeout=_REQUEST_SECONDS, trust_env=False)
        model = str(reply.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise ServerFailed(f"{base_url}/v1/models does not name a model: {type(error).__name__}: {error}") from None
    return Server(name, base_url, model)


@contextmanager
def turn_of(server: Server | None, servers: Sequence[Server]) -> Iterator[None]:
    """Only `server` runs in the block; with None, none of them does."""
    others = [other for other in servers if other is not server]
    for other in others:
        other.pause()
    try:
        yield
    finally:
        for other in others:
            other.resume()


def _wait_for_answer(server: Server, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.perf_counter() + _START_SECONDS
    while time.perf_counter() < deadline and process.poll() is None:
        try:
            server.embed(["hello world"])
        except ServerFailed:
            time.sleep(_POLL_SECONDS)
        else:
            return True
    return False


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of a worker; no network, no telemetry."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return clean | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | dict(extra)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
