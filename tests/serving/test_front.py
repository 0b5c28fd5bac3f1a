"""Front processes as threads of the test's own process: what each of them does, seen from inside."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import fronts
from serving.front import FrontServer, read_settings
from serving.models import load_model
from serving.server import WorkerServer
from serving.settings import ModelSource
from tests.serving.conftest import make_settings, serve, wait_until

WAIT = 30
TOKEN = {"authorization": "Bearer token"}


class ThreadedFront:
    """Stands for the process: the same server on the same two files."""

    pid = 0

    def __init__(self, listener: socket.socket, stream: socket.socket, _: int) -> None:
        self._listener, self._stream = listener.dup(), stream.dup()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        settings = read_settings(self._stream)
        assert settings is not None
        for each in (self._listener, self._stream):
            each.setblocking(False)
        FrontServer(settings, self._stream).run(sockets=[self._listener])
        self._listener.close()

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("front", timeout or 0)
        return 0

    def kill(self) -> None:
        raise AssertionError("a front had to be killed")


@pytest.fixture
def served(bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, WorkerServer]]:
    """A worker behind two such fronts, with an admin API and a request log."""
    monkeypatch.setattr(fronts, "_start", ThreadedFront)
    settings = make_settings(
        bundles / "v0",
        http_processes=2,
        models={"root": bundles, "available": [{"path": bundles / "v0"}]},
        security={"admin_tokens": ["token"]},
        request_log={"folder": tmp_path / "log", "sample_ratio": 1},
    )
    model = load_model(ModelSource(path=bundles / "v0"))
    with serve(settings, model) as (url, server):
        yield url, server


def post(url: str, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=WAIT, **options)


def test_front_embeds_counts_logs_and_follows_a_swap(served: tuple[str, WorkerServer], tmp_path: Path) -> None:
    url, _ = served
    first = post(url, "/api/v1/embed", {"texts": ["red cat", "dog"]})
    assert first.status_code == 200
    assert len(first.json()["embeddings"]) == 2
    version = first.headers["x-model-version"]
    assert post(url, "/v1/embeddings", {"input": "red", "model": "tiny"}).json()["data"][0]["index"] == 0
    assert len(post(url, "/embed", {"inputs": ["red"]}).json()) == 1
    refused = [
        post(url, "/api/v1/embed", {"text": "red", "dimensions": 0}).status_code,
        post(url, "/api/v1/embed", {"text": "red", "model": "other"}).status_code,
        post(url, "/api/v1/embed", {}, headers={"x-model-version": "none"}).status_code,
    ]
    assert refused == [400, 404, 400]
    assert httpx.get(f"{url}/api/v1/models", timeout=WAIT).json()["models"][0]["name"] == "tiny"

    def count(line: str) -> bool:
        return line in httpx.get(f"{url}/metrics", timeout=WAIT).text

    wait_until(lambda: count(f'akidb_embed_requests_total{{model="tiny",model_version="{version}",status="200"}} 3.0'))
    wait_until(lambda: count('akidb_embed_errors_total{error="invalid_request",model="none",model_version="none"} 2.0'))

    swapped = post(url, "/api/v1/admin/models/swap", {"bundle": "v1"}, headers=TOKEN)
    assert swapped.status_code == 200
    after = post(url, "/api/v1/embed", {"texts": ["red cat", "dog"]})
    assert after.status_code == 200
    assert after.headers["x-model-version"] == swapped.json()["model_version"] != version
    assert after.json()["embeddings"] != first.json()["embeddings"]
    wait_until(lambda: 'texts_total{outcome="written"} 6.0' in httpx.get(f"{url}/metrics", timeout=WAIT).text)
    assert len([line for path in (tmp_path / "log").iterdir() for line in path.read_bytes().splitlines()]) == 6


def test_front_that_is_told_nothing_ends(bundle: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    assert read_settings(theirs) is None
    theirs.close()
