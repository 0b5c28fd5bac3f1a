"""Work that must not slow down answers: a thread, and those it starts, at low priority until the work is done."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# About a tenth of a normal thread's share while both want the same core.
_NICE = 10
_TASKS = Path("/proc/self/task")


@contextmanager
def low_priority() -> Iterator[None]:
    """Run the block at low priority where that can be undone: an engine's threads inherit it and have to get rid of it.

    Linux gives threads a priority each; raising it again takes root, CAP_SYS_NICE or RLIMIT_NICE. Without them, and on
    other systems, the block runs as it is.
    """
    if not _TASKS.is_dir() or not _can_undo():
        yield
        return
    own = threading.get_native_id()
    usual = os.getpriority(os.PRIO_PROCESS, own)
    before = set(os.listdir(_TASKS))
    os.setpriority(os.PRIO_PROCESS, own, min(usual + _NICE, 19))
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, own, usual)
        for task in set(os.listdir(_TASKS)) - before:
            _raise_to(int(task), usual)


def _raise_to(task: int, usual: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, task, usual)
    except ProcessLookupError:
        return  # a thread that has ended meanwhile


def _can_undo() -> bool:
    """Try it on a thread that nobody needs."""
    allowed = []

    def attempt() -> None:
        own = threading.get_native_id()
        usual = os.getpriority(os.PRIO_PROCESS, own)
        try:
            os.setpriority(os.PRIO_PROCESS, own, min(usual + 1, 19))
            os.setpriority(os.PRIO_PROCESS, own, usual)
        except PermissionError:
            return
        allowed.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(allowed)
