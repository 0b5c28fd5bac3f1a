"""The queue between requests and the engine: who is let in, and who comes next. Pure: no clock, no thread, no I/O.

Order. Every text has a due time, and the texts due first go first. A request owes nothing for its first text: it is due
on arrival. Each further text of the same request is due when an engine that gives the request a share of its rate would
reach it; the share is the smaller the more requests of many texts wait, so that up to thirty together are owed no more
than the engine has, and what is left is there for newcomers. So a lone short request overtakes the tail of a 2,048-text
one, large requests take turns, and nothing starves: nobody can be put before a text whose due time has passed.

Texts with the same ids that are in flight at the same time share one row of the engine.
"""

from bisect import insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.tokenizer import Ids

# Part of the engine's rate a request of many texts is owed while others wait; alone, it has all of it. The n-th such
# request is owed an n-th of this: 0.57 of the rate for five of them, 0.9 for twenty.
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
    """One row for the engine: its ids, its due time in the caller's clock, and the places its vector goes to.

    A place is a request and an index in it; there are several when identical texts wait at the same time.
    """

    ids: Ids
    length: int
    due: float
    key: bytes
    arrival: float
    places: list[tuple[Request, int]]

    @property
    def is_dead(self) -> bool:
        """Whether nobody waits for the vector any more."""
        return all(request.is_dead for request, _ in self.places)

    def put(self, vector: NDArray[np.float32]) -> None:
        """Hand the vector [D] to everyone who waits for it."""
        for request, index in self.places:
            request.put(index, vector)

    def fail(self, error: type[Exception], reason: str) -> None:
        """Fail everyone who waits, each with the place of the text in its own request."""
        for request, index in self.places:
            request.fail(error(f"text {index}: {reason}"))


def _due(item: Item) -> float:
    return item.due


class RequestQueue:
    """Rows waiting for the engine, sorted by due time, and those in it. Not thread-safe: the owner locks."""

    def __init__(self, max_tokens: int, max_size: int) -> None:
        self._items: list[Item] = []
        self._in_flight: dict[bytes, Item] = {}  # from `push` until `forget`
        self._large: list[Request] = []  # of many texts, not answered yet when the last one came
        self._max_tokens = max_tokens
        self._max_size = max_size
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._items)

    def is_full(self, num_coming: int = 0) -> bool:
        """Whether a limit is reached; `num_coming` texts are admitted but not yet tokenised."""
        return self.num_tokens >= self._max_tokens or len(self._items) + num_coming >= self._max_size

    def count_due_tokens(self, now: float, stop_at: float) -> int:
        """Tokens a text that arrives now cannot overtake; counting may end where they exceed `stop_at`."""
        if not self._items or self._items[-1].due <= now:
            return self.num_tokens  # requests of one text only, however many: a refusal must cost nothing
        tokens = 0
        for item in self._items:
            if item.due > now or tokens > stop_at:
                break
            tokens += item.length
        return tokens

    def push(
        self,
        request: Request,
        rows: Sequence[Ids],
        tokens_per_second: float,
        share: float = FAIR_SHARE,
        recalled: Collection[int] = (),
    ) -> int:
        """Queue the texts of `request`, its shortest first so that neighbours in the queue have similar lengths.

        Those `recalled` have their vectors. A text whose ids are in flight already, and due no later, gets that row's
        vector. Returns how many do.
        """
        lengths = [len(ids) for ids in rows]
        due, items = request.arrival, []
        if len(rows) > 1:
            self._large = [*(other for other in self._large if not other.is_dead), request]
            share /= len(self._large)
        num_shared = 0
        for index in sorted(range(len(rows)), key=lengths.__getitem__):
            if index in recalled:
                continue
            key, length = rows[index].tobytes(), lengths[index]
            twin = self._in_flight.get(key)
            if twin is not None and twin.due <= due:
                twin.places.append((request, index))
                num_shared += 1
            else:
                item = Item(rows[index], length, due, key, request.arrival, [(request, index)])
                self._in_flight[key] = item
                items.append(item)
                self.num_tokens += length
            due += length / (share * tokens_per_second)
        self._insert(items)
        return num_shared

    def _insert(self, items: Sequence[Item]) -> None:
        if len(items) < _BULK_TEXTS:
            for item in items:
                insort(self._items, item, key=_due)
        else:
            self._items.extend(items)
            self._items.sort(key=_due)

    def oldest_arrival(self) -> float | None:
        """When the text that is due first arrived; None when nothing waits."""
        return self._items[0].arrival if self._items else None

    def peek(self, count: int) -> list[Item]:
        """The first `count` rows by due time that somebody waits for; the dead ones before them are dropped."""
        alive: list[Item] = []
        scanned = 0
        for item in self._items:
            if len(alive) == count:
                break
            scanned += 1
            if item.is_dead:
                self.num_tokens -= item.length
                self.forget((item,))
            else:
                alive.append(item)
        if scanned != len(alive):
            self._items[:scanned] = alive
        return alive

    def remove(self, window: Sequence[Item], taken: Sequence[Item]) -> None:
        """Take `taken` from the front of the queue; `window` is what `peek` returned just before."""
        gone = {id(item) for item in taken}
        self._items[: len(window)] = [item for item in window if id(item) not in gone]
        self.num_tokens -= sum(item.length for item in taken)

    def forget(self, items: Sequence[Item]) -> None:
        """The rows are answered or dropped: no further text may share them."""
        for item in items:
            if self._in_flight.get(item.key) is item:
                del self._in_flight[item.key]
