"""A flow that runs in a terminal's own process: quiet logs, and no run left open by one that is dead."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_client, tags
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from flows.environment import end_orphans
from registry.errors import RegistryError
from serving.errors import ServingError
from tasks.errors import TaskError
from tasks.state import describe_process, is_dead

# Whose flow run it is, as a tag: the next run can tell that its owner is dead.
_PROCESS_TAG = "process: "
_OUR_ERRORS = (TaskError, RegistryError, ServingError)


@contextmanager
def local_run() -> Iterator[None]:
    """A flow in the block runs in this process: it closes what dead ones left, and leaves word whose it is itself."""
    end_orphans()
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_our_tracebacks)
    close_dead_flow_runs()
    with tags(_PROCESS_TAG + describe_process(os.getpid())):
        yield


def close_dead_flow_runs() -> None:
    """Mark flow runs of killed processes of this machine as crashed: they could not say so themselves."""
    types = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PAUSED])
    running = FlowRunFilter(state=FlowRunFilterState(type=types))
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=running):
            owners = [tag.removeprefix(_PROCESS_TAG) for tag in flow_run.tags if tag.startswith(_PROCESS_TAG)]
            if any(is_dead(owner) for owner in owners):
                client.set_flow_run_state(flow_run.id, Crashed(message="The process was killed."), force=True)


def _without_our_tracebacks(record: logging.LogRecord) -> bool:
    """Our own errors explain themselves in one line; Prefect would print its engine's stack above it."""
    if record.exc_info and isinstance(record.exc_info[1], _OUR_ERRORS):
        record.exc_info, record.exc_text = None, None
    return True
