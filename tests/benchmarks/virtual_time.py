"""An event loop whose clock jumps to the next timer when nothing else happens: delays are exact and take no time."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

# Bytes sent to a socket of the same process are there at once; this much real time is allowed for it.
_GRACE_SECONDS = 0.005
T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` stands still while there is something to do."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._virtual_loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        events = super().select(_GRACE_SECONDS)
        if not events:
            self._virtual_loop.now += timeout
        return events


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
