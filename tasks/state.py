"""Where thorforge keeps its state, and which process a piece of it belongs to."""

import os
import socket
from pathlib import Path

import psutil

from registry.store import STATE_VARIABLE

_CLOCK_SECONDS = 60.0


def state_dir() -> Path:
    """Where thorforge keeps all its state: `$THORFORGE_HOME`, by default `.thorforge` of the working folder."""
    return Path(os.environ.get(STATE_VARIABLE, ".thorforge")).absolute()


def describe_process(pid: int) -> str:
    """Host, process id and start time: a reused process id is another process."""
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time():.2f}"


def is_dead(process: str) -> bool:
    """Whether a process of this host is gone; one of another host is not ours to judge."""
    host, pid, started = process.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        # A clock that is set right moves the start time of every process a little.
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
