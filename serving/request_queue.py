"""The queue between requests and the engine: who is let in, and who comes next. Pure: no clock, no thread, no I/O.

Order. Every text has a due time, and the texts due first go first. The text of a request that has no other is due on
arrival. Requests of many texts wait in a lane of their own, where they take turns. All of them together, however many
there are, are owed a part of the engine's rate, and the lane's next text is due when that would reach it. What single
texts leave goes to the lane too and is not held against it. So a lone text overtakes the tail of a 2,048-text request,
and of a hundred of them, and nothing starves: nobody can be put before a text whose due time has passed.

Texts with the same ids that are in flight at the same time share one row of the engine.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.ordered import Ordered
from serving.tokenizer import Ids

# Part of the engine's rate that all requests of many texts together are owed while single texts wait.
BULK_SHARE = 0.25


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
        """Store the vector [D] of text `index`; the last one resolves the waiter."""
        self.vectors[index] = vector
        self._note_put(1)

    def put_all(self, indices: list[int], vectors: NDArray[np.float32]) -> None:
        """Store the vectors [N, D] of N texts, which takes a third of the time of storing one after the other."""
        self.vectors[indices] = vectors
        self._note_put(len(indices))

    def _note_put(self, count: int) -> None:
        self.missing -= count
        if self.missing == 0 and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """Resolve the waiter with `error` unless it is resolved already."""
        if not self.waiter.done():
            self.waiter.set_exception(error)


@dataclass(slots=True, eq=False)
class Item:
    """One row for the engine: its ids, its due time in the caller's clock, and the places its vector goes to.

    A place is a request and an index in it; there are several when identical texts wait at the same time. `turn` orders
    the texts of the lane, whose due times only `RequestQueue.peek` knows; it is 0 for all others.
    """

    ids: Ids
    length: int
    due: float
    key: bytes
    arrival: float
    places: list[tuple[Request, int]]
    turn: float = 0.0

    @property
    def is_bulk(self) -> bool:
        """Whether it waits in the lane."""
        return self.turn > 0

    @property
    def is_dead(self) -> bool:
        """Whether nobody waits for the vector any more."""
        for request, _ in self.places:  # noqa: SIM110  a generator would take four times as long
            if not request.waiter.done():
                return False
        return True

    def fail(self, error: type[Exception], reason: str) -> None:
        """Fail everyone who waits, each with the place of the text in its own request."""
        for request, index in self.places:
            request.fail(error(f"text {index}: {reason}"))


def put_rows(items: Sequence[Item], vectors: NDArray[np.float32], failed: Collection[int] = ()) -> Collection[Request]:
    """Hand the vectors [B, D] of a batch to everyone who waits for them, but the rows that `failed`; returns whom."""
    answered: dict[Request, tuple[list[int], list[int]]] = {}  # places in the request, rows of the batch
    for row, item in enumerate(items):
        if row not in failed:
            for request, index in item.places:
                found = answered.get(request)
                if found is None:
                    answered[request] = [index], [row]
                else:
                    found[0].append(index)
                    found[1].append(row)
    for request, (indices, rows) in answered.items():
        if len(rows) == 1:
            request.put(indices[0], vectors[rows[0]])
        else:
            request.put_all(indices, vectors[rows])
    return answered.keys()


_due, _turn = attrgetter("due"), attrgetter("turn")


class RequestQueue:
    """Rows waiting for the engine, in the order in which they are due, and those in it. Not thread-safe."""

    def __init__(self, max_tokens: int, max_size: int, turn_size: int = 1) -> None:
        """`turn_size` texts of a request in the lane have their turn together."""
        self._single: Ordered[Item] = Ordered(_due)
        self._bulk: Ordered[Item] = Ordered(_turn)  # the lane
        self._in_flight: dict[bytes, Item] = {}  # from `push` until `forget`
        self._large: list[Request] = []  # of many texts, not answered yet when the last one came
        self._max_tokens = max_tokens
        self._max_size = max_size
        self._turn_size = turn_size
        self.num_single_tokens = self.num_bulk_tokens = 0
        self._bulk_due = 0.0  # when the first text of the lane is due
        self._bulk_turn = 0.0  # of the text that was first in the lane last time it moved
        self._bulk_rate = math.inf  # tokens per second that the lane is owed

    def __len__(self) -> int:
        return len(self._single) + len(self._bulk)

    @property
    def num_tokens(self) -> int:
        """Of all texts that wait."""
        return self.num_single_tokens + self.num_bulk_tokens

    @property
    def num_single(self) -> int:
        """Texts that wait and are due."""
        return len(self._single)

    def is_full(self, is_bulk: bool, num_coming: int = 0) -> bool:
        """Whether a limit is reached: by single texts for those, by the lane for requests of many.

        `num_coming` texts are admitted but not yet tokenised.
        """
        items, num_tokens = (self._bulk, self.num_bulk_tokens) if is_bulk else (self._single, self.num_single_tokens)
        return num_tokens >= self._max_tokens or len(items) + num_coming >= self._max_size

    def count_due_tokens(self, now: float) -> int:
        """Tokens a text that arrives now cannot overtake: all single ones and what the lane is owed."""
        first = self._bulk.first
        if first is None or self._bulk_due > now:
            return self.num_single_tokens
        owed = first.length + (now - self._bulk_due) * self._bulk_rate
        return self.num_single_tokens + min(self.num_bulk_tokens, math.ceil(owed))

    def push(
        self,
        request: Request,
        rows: Sequence[Ids],
        tokens_per_second: float,
        weight: float = 1.0,
        recalled: Collection[int] = (),
    ) -> int:
        """Queue the texts of `request`, its shortest first so that neighbours in the queue have similar lengths.

        Those `recalled` have their vectors. A text whose ids are in flight already gets that row's vector, unless that
        has a later turn in the lane. Returns how many do. There the n-th request gets an n-th of the turns of the first
        (those that came first are done first), and `weight` times that.
        """
        is_bulk, lengths = len(rows) > 1, [len(ids) for ids in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        if recalled:
            order = [index for index in order if index not in recalled]
        turns = [0.0]
        if is_bulk:
            self._large = [*(other for other in self._large if not other.waiter.done()), request]
            self._open_lane(request.arrival, tokens_per_second)
            turns = self._list_turns([lengths[index] for index in order], weight / len(self._large))
        items, num_shared = list[Item](), 0
        for index, turn in zip(order, turns, strict=False):
            key, length = rows[index].tobytes(), lengths[index]
            twin = self._in_flight.get(key)
            if twin is not None and not is_bulk and twin.is_bulk:
                self._bring_forward(twin, request.arrival)
            if twin is not None and twin.turn <= turn:
                twin.places.append((request, index))
                num_shared += 1
            else:
                item = Item(rows[index], length, request.arrival, key, request.arrival, [(request, index)], turn)
                self._in_flight[key] = item
                items.append(item)
        self._insert(items, is_bulk)
        return num_shared

    def _list_turns(self, lengths: Sequence[int], weight: float) -> list[float]:
        """Of a request's texts in the lane: those that have their turn together have that of the last of them."""
        size, ends = self._turn_size, list(accumulate(lengths))
        last = len(ends) - 1
        return [self._bulk_turn + ends[min(k - k % size + size - 1, last)] / weight for k in range(len(ends))]

    def _open_lane(self, now: float, tokens_per_second: float) -> None:
        self._bulk_rate = BULK_SHARE * tokens_per_second
        if not self._bulk:  # nothing was owed meanwhile
            self._bulk_due = max(self._bulk_due, now)

    def _bring_forward(self, item: Item, due: float) -> None:
        """Out of the lane: a single text wants the same row."""
        self._bulk.settle().remove(item)
        self._count([item], -1)
        item.turn, item.due = 0.0, due
        self._insert([item], is_bulk=False)

    def _insert(self, items: Sequence[Item], is_bulk: bool) -> None:
        (self._bulk if is_bulk else self._single).add(items)
        self._count(items, 1)

    def _count(self, items: Sequence[Item], sign: int) -> None:
        for item in items:
            if item.turn:
                self.num_bulk_tokens += sign * item.length
            else:
                self.num_single_tokens += sign * item.length

    def oldest_arrival(self) -> float | None:
        """When the first of the texts that wait arrived; None when nothing waits."""
        return min([item.arrival for item in (self._single.first, self._bulk.first) if item is not None], default=None)

    def peek(self, count: int) -> list[Item]:
        """The first `count` rows by due time that somebody waits for; the dead ones before them are dropped."""
        single = self._first_alive(self._single.settle(), count)
        if not self._bulk:
            return single
        bulk, due = self._first_alive(self._bulk.settle(), count), self._bulk_due
        for item in bulk:
            item.due = due
            due += item.length / self._bulk_rate
        return sorted([*single, *bulk], key=_due)[:count]

    def _first_alive(self, queue: list[Item], count: int) -> list[Item]:
        """The first `count` that somebody waits for; the dead before them are taken out."""
        alive: list[Item] = []
        dead: list[Item] = []
        for item in queue:
            if len(alive) == count:
                break
            (dead if item.is_dead else alive).append(item)
        if dead:
            queue[: len(alive) + len(dead)] = alive
            self._count(dead, -1)
            self.forget(dead)
        return alive

    def remove(self, window: Sequence[Item], taken: Sequence[Item], now: float) -> None:
        """Take `taken` from the front of the queue; `window` is what `peek` returned just before."""
        gone = {id(item) for item in taken}
        self._count(taken, -1)
        bulk = [item for item in taken if item.turn]
        if bulk:
            # What the lane gets before it is due is a gift: from now on it is owed its part as ever.
            num_tokens = sum(item.length for item in bulk)
            self._bulk_due = min(self._bulk_due, now) + num_tokens / self._bulk_rate
            self._bulk_turn = self._bulk.settle()[0].turn
        for waiting in (self._single, self._bulk) if self._bulk else (self._single,):
            items = waiting.settle()
            items[: len(window)] = [item for item in items[: len(window)] if id(item) not in gone]
        for item in bulk:
            item.turn = 0.0  # it runs: whoever comes may share its row

    def forget(self, items: Sequence[Item]) -> None:
        """The rows are answered or dropped: no further text may share them."""
        for item in items:
            if self._in_flight.get(item.key) is item:
                del self._in_flight[item.key]
