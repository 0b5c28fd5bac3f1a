import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from registry.errors import DigestMismatch
from tasks.errors import SourceUnreachable, TeacherRejected
from tasks.measurement.hardware import cpu_flags, describe_hardware, memory_gib, num_cores
from tasks.sources import open_source
from tests.bundles import make_bundle
from tests.certificates import write_pair


class Worker(BaseHTTPRequestHandler):
    """Speaks as much of the native API as evaluation uses: each text's embedding is its length and its place."""

    broken = False
    key: str | None = None

    def do_GET(self) -> None:
        self._reply(
            {"models": [{"name": "tiny", "version": "v1", "default": True}]} if self.path == "/api/v1/models" else {}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["encoding_format"] == "base64"
        rows = [np.array([len(text), index], dtype="<f4").tobytes() for index, text in enumerate(body["texts"])]
        self._reply({"embeddings": [base64.b64encode(row).decode() for row in rows]})

    def _reply(self, document: object) -> None:
        status = 500 if self.broken and self.command == "POST" else 200
        if self.key is not None and self.headers["authorization"] != f"Bearer {self.key}":
            status = 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  the base class's name
        pass


@contextmanager
def serve(handler: type[Worker], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The handler behind a URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # a client that does not trust us
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def worker() -> Iterator[tuple[str, type[Worker]]]:
    handler = type("Handler", (Worker,), {})
    with serve(handler) as url:
        yield url, handler


def test_source_worker_is_asked_in_batches_and_answers_in_order(worker: tuple[str, type[Worker]]) -> None:
    url, _ = worker
    source = open_source(url + "/")
    steps: list[int] = []
    embeddings = source.encode(["x" * (index % 50) for index in range(300)], steps.append)
    source.close()
    assert (source.kind, source.name) == ("worker", "tiny v1")
    np.testing.assert_array_equal(embeddings[:, 0], [index % 50 for index in range(300)])
    assert steps == [128, 128, 44]


def test_source_worker_that_fails_is_unreachable(worker: tuple[str, type[Worker]]) -> None:
    url, handler = worker
    source = open_source(url)
    handler.broken = True
    with pytest.raises(SourceUnreachable, match=r"failed to embed: HTTPStatusError.*500"):
        source.encode(["a"], lambda steps: None)
    source.close()


def test_source_url_that_is_no_worker_is_unreachable(worker: tuple[str, type[Worker]]) -> None:
    url, _ = worker
    with pytest.raises(SourceUnreachable, match="does not answer as a thorforge worker"):
        open_source(f"{url}/elsewhere")
    with pytest.raises(SourceUnreachable, match=r"127\.0\.0\.1:9 does not answer.*ConnectError"):
        open_source("http://127.0.0.1:9")


def test_source_worker_gets_the_key_of_the_environment(
    worker: tuple[str, type[Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = worker
    handler.key = "right-key"
    for wrong in (None, "wrong-key"):
        if wrong is not None:
            monkeypatch.setenv("THORFORGE_API_KEY", wrong)
        with pytest.raises(SourceUnreachable, match=r"wants an API key \(401\), .* THORFORGE_API_KEY") as refused:
            open_source(url)
        assert "wrong-key" not in str(refused.value)
    monkeypatch.setenv("THORFORGE_API_KEY", "two\nlines")
    with pytest.raises(SourceUnreachable, match="THORFORGE_API_KEY is empty or has") as refused:
        open_source(url)
    assert "two" not in str(refused.value)
    monkeypatch.setenv("THORFORGE_API_KEY", "right-key")
    source = open_source(url)
    assert source.encode(["a"], lambda steps: None).shape == (1, 2)
    source.close()


def test_source_worker_is_trusted_by_the_certificate_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = write_pair(tmp_path, "worker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serve(type("Handler", (Worker,), {}), context) as url:
        with pytest.raises(SourceUnreachable, match="certificate verify failed"):
            open_source(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
        with pytest.raises(SourceUnreachable, match="SSL_CERT_FILE"):
            open_source(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        open_source(url).close()


def test_source_bundle_is_verified_before_it_is_opened(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    source = open_source(str(tmp_path / "bundle"))
    embeddings = source.encode(["hello world", "cat"], lambda steps: None)
    source.close()
    assert (source.kind, embeddings.shape) == ("bundle", (2, 8))
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(DigestMismatch, match=r"model\.onnx"):
        open_source(str(tmp_path / "bundle"))


def test_source_model_that_brings_code_is_rejected_and_none_of_it_is_run(teacher_copy: Path) -> None:
    modules = json.loads((teacher_copy / "modules.json").read_text())
    marker = teacher_copy.parent / "code-was-run"
    (teacher_copy / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    modules[2]["type"] = "evil.Normalize"
    (teacher_copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(TeacherRejected):
        open_source(str(teacher_copy))
    assert not marker.exists()


def test_hardware_is_one_line_that_names_cores_and_memory() -> None:
    line = describe_hardware()
    assert "\n" not in line
    assert f"{num_cores()} cores" in line
    assert memory_gib() > 0.1
    assert all(flag in line for flag in cpu_flags())


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("echo 'NVIDIA Thor, 580.1'", ", NVIDIA Thor, 580.1"),
        ("echo 'NVIDIA L4, 580.1'; echo 'NVIDIA L4, 580.1'", ", 2 x NVIDIA L4, 580.1"),
        ("exit 9", ""),
    ],
)
def test_hardware_names_the_gpus_that_engines_of_the_gpu_are_timed_on(
    script: str, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tasks.measurement.hardware.has_nvidia_driver", lambda: False)
    without = describe_hardware()
    monkeypatch.setattr("tasks.measurement.hardware.has_nvidia_driver", lambda: True)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_hardware() == without + named
