"""Where thorforge keeps its state, and which process a piece of it belongs to."""

import os
import socket
from pathlib import Path

import psutil

STATE_VARIABLE = "THORFORGE_HOME"
REGISTRY_VARIABLE = "THORFORGE_REGISTRY"


def state_dir() -> Path:
    """Where thorforge keeps all its state: `$THORFORGE_HOME`, by default `.thorforge` of the working folder."""
    return Path(os.environ.get(STATE_VARIABLE, ".thorforge")).absolute()


def default_registry() -> Path:
    """The folder registry: `$THORFORGE_REGISTRY`, by default `registry` of the state folder."""
    return Path(os.environ.get(REGISTRY_VARIABLE) or state_dir() / "registry")


def describe_process(pid: int) -> str:
    """Host, process id and start time: a reused process id is another process."""
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time():.2f}"


def is_dead(process: str) -> bool:
    """Whether a process of this host is gone; one of another host is not ours to judge."""
    host, pid, _ = process.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        return describe_process(int(pid)) != process
    except psutil.NoSuchProcess:
        return True
