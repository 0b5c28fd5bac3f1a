"""Follows the bundles that are configured: a folder that changes, or a file that names another, is swapped in."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from serving.errors import ServingError
from serving.settings import ModelSource
from serving.sources import fingerprint

# Swaps a source in; the name is the model's it has to be.
Swap = Callable[[ModelSource, str], Awaitable[object]]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watched:
    source: ModelSource
    model: str
    handled: str
    seen: str = field(init=False)

    def __post_init__(self) -> None:
        self.seen = self.handled


class Watcher:
    """Looks at each source in turn. A change is acted on once it has stood still from one look to the next."""

    def __init__(self, swap: Swap, interval_seconds: float) -> None:
        self._swap, self._interval_seconds = swap, interval_seconds
        self._watched: list[_Watched] = []

    def follow(self, source: ModelSource, model: str, handled: str) -> None:
        """Watch `source`, which serves `model`; `handled` is its fingerprint from before it was loaded."""
        self._watched.append(_Watched(source, model, handled))

    async def run(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        """Look at every source, `sleep` the interval, and so on until cancelled."""
        while True:
            await sleep(self._interval_seconds)
            for watched in self._watched:
                await self._look(watched)

    async def _look(self, watched: _Watched) -> None:
        now = await asyncio.to_thread(fingerprint, watched.source.path)
        has_settled, watched.seen = now == watched.seen, now
        if now == watched.handled or not has_settled:
            return
        watched.handled = now  # a bundle that is refused is not tried again until it changes
        try:
            await self._swap(watched.source, watched.model)
        except ServingError as error:
            _log.error("watched bundle refused model=%s reason=%s", watched.model, error)
        except Exception:  # the edge of a loop: a defect in one swap must not end the watch
            _log.exception("watched bundle failed model=%s", watched.model)
