"""The worker's processes as a whole: swaps under load, signals, and what is left when one of them is killed."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.conftest import wait_until
from tests.worker import RunningWorker, run_worker

WAIT = 30
TOKEN = {"authorization": "Bearer token"}
ENV = {"AKIDB_EMBEDDING_HTTP_PROCESSES": "2", "AKIDB_EMBEDDING_SECURITY_ADMIN_TOKENS": "token"}


def fronts_of(worker: RunningWorker) -> list[psutil.Process]:
    return psutil.Process(worker.process.pid).children()


class Load:
    """Clients that ask until they are told to stop; each keeps its connection unless it is closed.

    Every request sent before the worker `is_leaving` has to be answered; `statuses` are theirs. One sent later may be
    refused or meet a closed port.
    """

    def __init__(self, url: str, texts: list[str]) -> None:
        self._url, self._texts = url, texts
        self._stop = threading.Event()
        self.begun = threading.Semaphore(0)
        self.statuses: list[int] = []
        self.versions: set[str] = set()
        self.is_leaving = False

    def ask(self) -> None:
        with httpx.Client(timeout=WAIT) as client:
            while not self._stop.is_set():
                is_late = self.is_leaving
                try:
                    answer = client.post(f"{self._url}/api/v1/embed", json={"texts": self._texts})
                except httpx.TransportError:
                    if not is_late:
                        raise
                    return
                if not is_late:
                    self.statuses.append(answer.status_code)
                elif answer.status_code != 200:
                    assert answer.json()["error"]["code"] == "not_ready"
                if answer.status_code == 200:
                    assert len(answer.json()["embeddings"]) == len(self._texts)
                    self.versions.add(answer.headers["x-model-version"])
                self.begun.release()

    def stop(self) -> None:
        self._stop.set()


@contextmanager
def under_load(url: str, texts: list[str], num_clients: int = 4) -> Iterator[Load]:
    """Some clients, each of which has been answered."""
    load = Load(url, texts)
    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(load.ask) for _ in range(num_clients)]
        try:
            for _ in range(2 * num_clients):
                assert load.begun.acquire(timeout=WAIT)
            yield load
        finally:
            load.stop()
        for client in clients:
            client.result()


def test_swaps_under_load_fail_no_request(bundles: Path) -> None:
    args = ("--models-root", str(bundles))
    with run_worker(bundles / "v0", *args, env=ENV) as worker, under_load(worker.base_url, ["red cat"] * 20) as load:
        for name in ("v1", "v2", "v0"):
            swap = f"{worker.base_url}/api/v1/admin/models/swap"
            answer = httpx.post(swap, json={"bundle": name}, headers=TOKEN, timeout=WAIT)
            assert (answer.status_code, len(answer.json()["retired"])) == (200, 1)
            new = httpx.post(f"{worker.base_url}/api/v1/embed", json={"text": "red"}, timeout=WAIT)
            assert new.headers["x-model-version"] == answer.json()["model_version"]
            for _ in range(8):
                assert load.begun.acquire(timeout=WAIT)
        wait_until(lambda: worker.log().count("freed model=tiny") == 3)
    assert set(load.statuses) == {200}
    assert len(load.versions) == 3
    assert worker.process.returncode == 0


@pytest.mark.parametrize("to_all", [False, True], ids=["main process", "all processes"])
def test_signal_under_load_answers_every_accepted_request_and_exits_0(bundle: Path, to_all: bool) -> None:
    args = ("--drain-grace-seconds", "5", "--drain-seconds", "30")
    with run_worker(bundle, *args, env=ENV) as worker:
        fronts = fronts_of(worker)
        assert len(fronts) == 2
        with under_load(worker.base_url, ["red cat"] * 300) as load:
            load.is_leaving = True
            for process in (*(fronts if to_all else ()), worker.process):
                process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{worker.base_url}/readyz").status_code != 200)
        assert worker.process.wait(2 * WAIT) == 0
        assert set(load.statuses) == {200}
        assert not any(front.is_running() for front in fronts)
        assert "killed" not in worker.log()


def test_fronts_end_with_the_engine_process(bundle: Path) -> None:
    with run_worker(bundle, env=ENV) as worker:
        fronts = fronts_of(worker)
        worker.process.kill()
        for front in fronts:
            wait_until(partial(_is_gone, front))


def _is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; it may be left for somebody else to reap."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_fronts_load_no_engine(bundle: Path) -> None:
    with run_worker(bundle, env=ENV) as worker:
        assert httpx.post(f"{worker.base_url}/embed", json={"inputs": "red"}).status_code == 200
        for front in fronts_of(worker):
            loaded = {Path(each.path).name for each in front.memory_maps()}
            assert any("tokenizers" in name for name in loaded)
            assert not any("onnxruntime" in name or "torch" in name or "openvino" in name for name in loaded)
