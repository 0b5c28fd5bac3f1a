"""A Dask scheduler that cannot be used says so before anything runs; tests/e2e/test_dask.py runs the flow on one."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner

from flows import workers
from flows.workers import check_workers, dask_workers, run_each
from tasks.errors import SchedulerUnreachable


@pytest.fixture
def silent_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that takes connections and never answers."""
    monkeypatch.setattr(workers, "_CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_unreachable_scheduler_is_named_and_threads_are_offered(
    monkeypatch: pytest.MonkeyPatch, silent_port: int, home: Path
) -> None:
    for address in (f"tcp://127.0.0.1:{closed_port()}", f"tcp://127.0.0.1:{silent_port}", "nowhere://x"):
        with pytest.raises(SchedulerUnreachable, match=rf"{address} within 0\.5 s .*or leave dask_scheduler out"):
            check_workers(address)
    assert not home.exists()


def test_without_a_scheduler_nothing_is_asked() -> None:
    with dask_workers(None):
        pass


@task
def find_thread(number: int) -> tuple[int, int]:
    return number, threading.get_ident()


@flow(task_runner=ThreadPoolTaskRunner(max_workers=2))  # type: ignore[arg-type]
def sweep() -> dict[str, tuple[int, int]]:
    return run_each({str(number): (find_thread, (number,)) for number in range(3)})


def test_without_a_scheduler_a_sweep_runs_where_an_interrupt_reaches_it(prefect: None) -> None:
    assert sweep() == {str(number): (number, threading.get_ident()) for number in range(3)}
