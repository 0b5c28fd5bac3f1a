"""The queue between requests and the engine: who is let in, and who comes next. Pure: no clock, no thread, no I/O.

Order. Every text has a due time, and the texts due first go first. A request owes nothing for its first text: it is due
on arrival. Each further text of the same request is due when an engine that gives the request a fixed share of its rate
would reach it. So a lone short request overtakes the tail of a 2,048-text one, two large requests take turns, and
nothing starves: nobody can be put before a text whose due time has passed.
"""

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import Overloaded
from serving.tokenizer import Ids

# Part of the engine's rate a request of many texts is owed while others wait; alone, it has all of it.
FAIR_SHARE = 0.25
# From here on, sorting the whole queue once is cheaper than inserting one by one.
_BULK_TEXTS = 16


class Waiter(Protocol):
    """What a request resolves: an asyncio or a concurrent future."""

    def done(self) -> bool:
        """Whether it was resolved or cancelled."""
        ...

    def set_result(self, result: None, /) -> None:
        """All vectors are there."""
        ...

    def set_exception(self, exception: Exception, /) -> None:
        """The request failed."""
        ...


class Request:
    """A client's texts on their way through the engine; `vectors` [N, D] fills up, in the client's order."""

    __slots__ = ("arrival", "engine_seconds", "missing", "vectors", "waiter")

    def __init__(self, count: int, dimension: int, arrival: float, waiter: Waiter) -> None:
        self.vectors: NDArray[np.float32] = np.empty((count, dimension), dtype=np.float32)
        self.missing = count
        self.arrival = arrival
        self.engine_seconds = 0.0  # of the runs its texts took part in
        self.waiter = waiter

    @property
    def is_dead(self) -> bool:
        """Answered, failed or given up: its remaining texts need no engine."""
        return self.waiter.done()

    def put(self, index: int, vector: NDArray[np.float32]) -> None:
        """Store the vector of text `index`; the last one resolves the waiter."""
        self.vectors[index] = vector
        self.missing -= 1
        if self.missing == 0 and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """Resolve the waiter with `error` unless it is resolved already."""
        if not self.waiter.done():
            self.waiter.set_exception(error)


@dataclass(slots=True, eq=False)
class Item:
    """One text of a request: its ids, its place in the request and its due time in seconds of the caller's clock."""

    request: Request
    index: int
    ids: Ids
    length: int
    due: float


def _due(item: Item) -> float:
    return item.due


class RequestQueue:
    """Texts waiting for the engine, sorted by due time. Not thread-safe: the owner locks."""

    def __init__(self, max_tokens: int, max_size: int) -> None:
        self._items: list[Item] = []
        self._max_tokens = max_tokens
        self._max_size = max_size
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._items)

    def admit(self, tokens_per_second: float, num_coming: int = 0) -> None:
        """Let a request in if the queue it finds is below both limits, however large the request is itself.

        `num_coming` texts are admitted but not yet tokenised. Raises Overloaded with the time the queue needs to empty.
        """
        size = len(self._items) + num_coming
        if self.num_tokens < self._max_tokens and size < self._max_size:
            return
        seconds = max(1.0, math.ceil(self.num_tokens / tokens_per_second))
        raise Overloaded(
            f"{size} texts with {self.num_tokens} tokens are waiting, limits {self._max_size} and {self._max_tokens}: "
            f"try again in {seconds:.0f} s",
            retry_after_seconds=seconds,
        )

    def push(self, request: Request, rows: Sequence[Ids], tokens_per_second: float, share: float = FAIR_SHARE) -> None:
        """Queue every text of `request`, its shortest first so that neighbours in the queue have similar lengths."""
        lengths = [len(ids) for ids in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        due, items = request.arrival, []
        for index in order:
            items.append(Item(request, index, rows[index], lengths[index], due))
            due += lengths[index] / (share * tokens_per_second)
        if len(items) < _BULK_TEXTS:
            for item in items:
                insort(self._items, item, key=_due)
        else:
            self._items.extend(items)
            self._items.sort(key=_due)
        self.num_tokens += sum(lengths)

    def oldest_arrival(self) -> float | None:
        """When the text that is due first arrived; None when nothing waits."""
        return self._items[0].request.arrival if self._items else None

    def peek(self, count: int) -> list[Item]:
        """The first `count` texts by due time whose clients still wait; the dead ones before them are dropped."""
        alive: list[Item] = []
        scanned = 0
        for item in self._items:
            if len(alive) == count:
                break
            scanned += 1
            if item.request.is_dead:
                self.num_tokens -= item.length
            else:
                alive.append(item)
        if scanned != len(alive):
            self._items[:scanned] = alive
        return alive

    def remove(self, window: Sequence[Item], taken: Sequence[Item]) -> None:
        """Remove `taken` from the front of the queue; `window` is what `peek` returned just before."""
        gone = {id(item) for item in taken}
        self._items[: len(window)] = [item for item in window if id(item) not in gone]
        self.num_tokens -= sum(item.length for item in taken)
