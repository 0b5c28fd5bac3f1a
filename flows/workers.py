"""Where a flow's submitted tasks run: threads of its own process, or the workers of a Dask scheduler."""

import asyncio
import platform
import uuid
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from prefect import Task
from prefect.context import FlowRunContext
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.errors import SchedulerUnreachable
from tasks.state import state_dir

_CONNECT_SECONDS = 10
K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
Call = tuple[Task[..., R], tuple[Any, ...]]
_ON_THREADS = "leave dask_scheduler out to run on threads of this process"


@contextmanager
def dask_workers(address: str | None) -> Iterator[None]:
    """Send the tasks that are submitted inside the block to the Dask scheduler at `address`; None changes nothing.

    A worker that dies costs its tasks another try on another worker. Raises SchedulerUnreachable before anything runs.
    """
    if address is None:
        yield
        return
    check_workers(address)
    from prefect_dask.task_runners import DaskTaskRunner  # noqa: PLC0415  seconds that a run on threads need not pay

    runner = DaskTaskRunner(address=address)
    context = FlowRunContext.get()
    assert context is not None, "used inside a flow"
    with runner, context.model_copy(update={"task_runner": runner}):
        yield


def run_each(calls: Mapping[K, Call[R]]) -> dict[K, R]:
    """The results of tasks that do not depend on one another: side by side on a Dask scheduler's workers, else in turn.

    Without workers they run in the flow's own thread, because an interrupt would wait for the end of a training that
    runs in another, and two trainings at once would take each other's cores.
    """
    context = FlowRunContext.get()
    assert context is not None, "used inside a flow"
    if isinstance(context.task_runner, ThreadPoolTaskRunner):
        return {key: task(*arguments) for key, (task, arguments) in calls.items()}
    futures = {key: task.submit(*arguments) for key, (task, arguments) in calls.items()}
    return {key: future.result() for key, future in futures.items()}


def check_workers(address: str) -> None:
    """Raise SchedulerUnreachable where no scheduler answers, has no workers, or these do not see our state folder."""
    from distributed import Client  # noqa: PLC0415  seconds that a run on threads need not pay

    try:
        workers = asyncio.run(_ask_for_workers(address))
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        raise SchedulerUnreachable(
            f"no Dask scheduler answers at {address} within {_CONNECT_SECONDS:g} s ({type(error).__name__}): "
            f"start one with `dask scheduler`, or {_ON_THREADS}"
        ) from None
    if not workers:
        raise SchedulerUnreachable(
            f"the Dask scheduler at {address} has no workers: start some with `dask worker {address} --nthreads 1`, "
            f"or {_ON_THREADS}"
        )
    probe = state_dir() / f".probe-{uuid.uuid4().hex}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    try:
        with Client(address, timeout=_CONNECT_SECONDS, set_as_default=False) as client:
            _compare_views(client.run(_look_around, probe.name))
    except ImportError as error:
        raise SchedulerUnreachable(f"a worker of {address} lacks {error.name}: install the same there") from None
    finally:
        probe.unlink()


async def _ask_for_workers(address: str) -> dict[str, Any]:
    """The scheduler's workers. Dask's own Client waits for ever where a port takes a connection and says nothing."""
    from distributed.comm.core import connect  # noqa: PLC0415  seconds that a run on threads need not pay

    async with asyncio.timeout(_CONNECT_SECONDS):
        comm = await connect(address, timeout=_CONNECT_SECONDS)
        try:
            await comm.write({"op": "identity", "reply": True})
            identity: dict[str, Any] = await comm.read()
        finally:
            comm.abort()
    return dict(identity["workers"])


def _compare_views(views: dict[str, tuple[bool, str]]) -> None:
    own = _python()
    for worker, (sees_probe, python) in views.items():
        if not sees_probe:
            raise SchedulerUnreachable(
                f"Dask worker {worker} does not see the state folder {state_dir()}: share it, set THORFORGE_HOME"
            )
        if python != own:
            raise SchedulerUnreachable(f"Dask worker {worker} runs Python {python}, this process {own}: use the same")


def _look_around(probe: str) -> tuple[bool, str]:
    """Whether a worker's state folder is ours, and its Python; runs there."""
    return (state_dir() / probe).exists(), _python()


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])
