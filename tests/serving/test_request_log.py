"""The request log: what is kept, how much of it, and that it never gets in a request's way."""

import base64
import errno
import json
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serving.errors import ConfigInvalid
from serving.models import load_model
from serving.request_log import Origin, RequestLog, open_request_log
from serving.settings import ModelSource, RequestLogSettings
from tests.serving.conftest import make_settings, serve, wait_until

MEBIBYTE = 1024 * 1024
ORIGIN = Origin("tiny", "fp32-1", None)
VECTORS = np.eye(4, 8, dtype=np.float32)


def settings(folder: Path, **values: Any) -> RequestLogSettings:
    return RequestLogSettings.model_validate({"folder": folder, "sample_ratio": 1, **values})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text("utf-8").splitlines()]


def write(folder: Path, *texts: str, **values: Any) -> Counter[str]:
    """Log texts as one request, wait until they are written and return what became of them."""
    outcomes: Counter[str] = Counter()
    log = open_request_log(settings(folder, **values), lambda outcome: outcomes.update([outcome]))
    assert log is not None
    log.offer(ORIGIN, texts, np.resize(VECTORS, (len(texts), 8)))
    log.close()
    return outcomes


def test_without_a_folder_there_is_no_log() -> None:
    assert open_request_log(RequestLogSettings(), print) is None


def test_text_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    assert write(tmp_path, "red cat", "ü") == {"written": 2}
    first, second = records(tmp_path)
    assert first.keys() == {"time", "model", "model_version", "prompt", "chars", "embedding"}
    assert (first["model"], first["model_version"], first["prompt"]) == ("tiny", "fp32-1", None)
    assert (first["chars"], second["chars"]) == (7, 1)
    vectors = [np.frombuffer(base64.b64decode(record["embedding"]), dtype="<f4") for record in (first, second)]
    np.testing.assert_array_equal(vectors, VECTORS[:2])
    assert first["time"].endswith("+00:00")
    assert "red" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_whole_text_is_kept_up_to_a_length_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "red\n🙂", "a" * 20_000, text="full", embedding=False)
    first, second = records(tmp_path)
    assert (first["text"], first["chars"]) == ("red\n🙂", 5)
    assert (len(second["text"]), second["chars"]) == (10_000, 20_000)
    assert "embedding" not in first


def test_hash_tells_equal_texts_and_differs_between_workers(tmp_path: Path) -> None:
    write(tmp_path / "one", "red", "cat", "red", text="hash")
    write(tmp_path / "two", "red", text="hash")
    first, second, third = (record["text_hash"] for record in records(tmp_path / "one"))
    (other,) = (record["text_hash"] for record in records(tmp_path / "two"))
    assert first == third
    assert len({first, second, other}) == 3
    assert "text" not in records(tmp_path / "one")[0]


def test_sampling_takes_its_share_of_the_texts(tmp_path: Path) -> None:
    draws = cycle([0.0, 0.2, 0.25, 0.9])
    log = RequestLog(settings(tmp_path, sample_ratio=0.25, text="full"), tmp_path, sample=lambda: next(draws))
    log.start()
    log.offer(ORIGIN, [str(number) for number in range(8)], np.zeros((8, 8), dtype=np.float32))
    log.close()
    assert [record["text"] for record in records(tmp_path)] == ["0", "1", "4", "5"]


def test_files_rotate_by_size_and_the_oldest_go(tmp_path: Path) -> None:
    texts = [f"{number:05}" + "x" * 9_000 for number in range(400)]
    write(tmp_path, *texts, text="full", max_file_bytes=MEBIBYTE, max_total_bytes=2 * MEBIBYTE)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= MEBIBYTE
    kept = [int(record["text"][:5]) for record in records(tmp_path)]
    assert kept == list(range(kept[0], 400))
    assert kept[0] > 0


def test_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "log"
    write(folder, "red")
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_full_queue_drops_and_counts_and_does_not_wait(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    log = RequestLog(settings(tmp_path), tmp_path, lambda outcome: outcomes.update([outcome]))
    log.offer(ORIGIN, ["red"] * 5000, np.zeros((5000, 8), dtype=np.float32))  # nobody writes yet
    assert outcomes == {"dropped": 5000 - 4096}
    log.start()
    log.close()
    assert outcomes["written"] == 4096


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_that_is_full_is_counted_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(os, "write", full_write(full))
    assert write(tmp_path, "red", "cat", "dog") == {"failed": 3}
    assert [record.getMessage() for record in caplog.records] == [
        f"request log cannot be written reason={os.strerror(errno.ENOSPC)!r}"
    ]
    monkeypatch.undo()
    os.close(full)
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())


def full_write(descriptor: int) -> Any:
    original, writer = os.write, "request-log"

    def to_full_disk(file: int, data: bytes) -> int:
        return original(descriptor if threading.current_thread().name == writer else file, data)

    return to_full_disk


def test_log_goes_on_when_its_file_and_folder_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    outcomes: Counter[str] = Counter()
    written = threading.Semaphore(0)

    def count(outcome: str) -> None:
        outcomes.update([outcome])
        written.release()

    log = open_request_log(settings(folder), count)
    assert log is not None
    folder.rmdir()
    log.offer(ORIGIN, ["red"], VECTORS)
    assert written.acquire(timeout=10)
    folder.mkdir()
    log.offer(ORIGIN, ["cat"], VECTORS)
    log.close()
    assert outcomes == {"failed": 1, "written": 1}
    assert len(records(folder)) == 1


def test_settings_that_cannot_work_stop_the_worker(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match=r"embedding\.request_log\.folder: cannot write to .*file"):
        open_request_log(settings(tmp_path / "file"), print)
    with pytest.raises(ConfigInvalid, match="max_total_bytes = 1048576 is less than"):
        open_request_log(settings(tmp_path, max_file_bytes=2 * MEBIBYTE, max_total_bytes=MEBIBYTE), print)


@pytest.fixture
def logged(bundle: Path, tmp_path: Path) -> Iterator[str]:
    own = make_settings(bundle, request_log={"folder": tmp_path / "log", "sample_ratio": 1, "text": "full"})
    with serve(own, load_model(ModelSource(path=bundle))) as (address, _):
        yield address


def test_worker_logs_what_it_answered_and_nothing_else(logged: str, tmp_path: Path) -> None:
    answer = httpx.post(f"{logged}/api/v1/embed", json={"texts": ["red", "cat"], "prompt": "query"}).json()
    httpx.post(f"{logged}/embed", json={"inputs": "dog"})
    httpx.post(f"{logged}/embed", json={"inputs": "red " * 40, "truncate": False})
    wait_until(lambda: 'texts_total{outcome="written"} 3.0' in httpx.get(f"{logged}/metrics").text)
    found = records(tmp_path / "log")
    assert [(record["text"], record["prompt"]) for record in found] == [
        ("red", "query"),
        ("cat", "query"),
        ("dog", None),
    ]
    vector = np.frombuffer(base64.b64decode(found[1]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(vector, answer["embeddings"][1])
