import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from registry.errors import DigestMismatch
from tasks.errors import SourceUnreachable, TeacherRejected
from tasks.hardware import cpu_flags, describe_hardware, memory_gib, num_cores
from tasks.sources import open_source
from tests.bundles import make_bundle


class Worker(BaseHTTPRequestHandler):
    """Speaks as much of the native API as evaluation uses: each text's embedding is its length and its place."""

    broken = False

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
        self.send_response(500 if self.broken and self.command == "POST" else 200)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  the base class's name
        pass


@pytest.fixture
def worker() -> Iterator[tuple[str, type[Worker]]]:
    handler = type("Handler", (Worker,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


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
