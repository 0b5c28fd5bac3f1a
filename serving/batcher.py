"""Which waiting texts share an engine run. Pure: time comes in as an argument.

The text that is due first is always in. Around it, in order of length, the batch grows while that raises the tokens per
second the engine is predicted to reach: a longer text pads all others, a run of its own costs the engine's overhead.
An engine that packs its texts gets them in the order in which they are due.
While a single text waits, only texts that are due are taken, so that those of large requests, which wait in numbers, do
not take its place; what is mostly overhead takes some of them along.
Once the first text is older than the age bound, only texts as old as that are taken, so that nothing younger passes.
No batch grows past what is predicted to run within the time bound, except that one text always goes.
Where several runs go on at a time, one that takes all that waits leaves nothing to the next that ends: each takes its
share of it, as long as that is worth a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serving.latency_model import LatencyModel
from serving.request_queue import Item, RequestQueue
from serving.shapes import EXACT, ShapeGrid
from serving.tokenizer import Ids, pad_batch

# Texts considered for one batch where their lengths matter, as a multiple of the largest batch.
_WINDOW_BATCHES = 4
# A share is worth a run of its own if it has this many times the tokens that could be computed instead of starting it.
_WORTHWHILE = 4.0
# What starting a run takes beside the engine's overhead: threads wait for the interpreter, and caches are cold.
_START_SECONDS = 0.00085
MAX_AGE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine run may hold and take, and how long an idle engine waits for more."""

    max_batch_size: int
    max_batch_tokens: int
    max_wait_seconds: float = 0.0
    max_age_seconds: float = MAX_AGE_SECONDS
    max_run_seconds: float = math.inf


@dataclass(slots=True, eq=False)
class Batch:
    """Texts that share an engine run. `reason` says why it is not larger: queue, size, tokens, latency or length."""

    items: list[Item]
    reason: str
    formed_at: float
    num_tokens: int
    padded_length: int
    padded_tokens: int
    """What the engine computes: with the padding, unless it packs its texts."""

    def pad(self) -> tuple[Ids, Ids]:
        """(input_ids, attention_mask), int64 [B, T]."""
        return pad_batch([item.ids for item in self.items], self.padded_length)


class Batcher:
    """Forms batches from a queue; `model` says what an engine run takes."""

    def __init__(
        self, queue: RequestQueue, limits: Limits, model: LatencyModel, grid: ShapeGrid = EXACT, num_runs: int = 1
    ) -> None:
        """`num_runs` batches may run at the same time."""
        self.queue, self.model = queue, model
        self._limits, self._grid, self._num_runs = limits, grid, num_runs
        self._budget = limits.max_batch_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest batch, padding included: within the budget and the time a run may take."""
        limits, budget = self._limits, self._budget
        if math.isinf(limits.max_run_seconds):
            return budget
        return min(budget, self.model.max_tokens(limits.max_run_seconds))

    def limit_tokens(self, tokens: int | None) -> None:
        """Form no batch of more tokens: the engine's memory does not hold it; None: as configured."""
        configured = self._limits.max_batch_tokens
        self._budget = configured if tokens is None else min(configured, tokens)

    def wait_seconds(self, now: float) -> float | None:
        """How long an idle engine should wait before taking a batch; None while nothing is queued."""
        oldest = self.queue.oldest_arrival()
        if oldest is None:
            return None
        if self.is_full():
            return 0.0
        return max(0.0, oldest + self._limits.max_wait_seconds - now)

    def is_full(self) -> bool:
        """Whether the queue fills a batch, so that waiting for more cannot improve it."""
        return len(self.queue) >= self._limits.max_batch_size or self.queue.num_tokens >= self.max_tokens

    def is_settled(self) -> bool:
        """Whether single texts alone fill the next batch, so that nothing that comes can go before any of it."""
        return self.queue.num_single >= self._limits.max_batch_size or self.queue.num_single_tokens >= self.max_tokens

    def take(self, now: float, num_takers: int = 1) -> Batch | None:
        """Remove the next batch from the queue, shortest text first; None when no client waits.

        Leaves their parts to the other `num_takers` that are free as well.
        """
        num_batches = 1 if self._grid.is_packed else _WINDOW_BATCHES
        window = self.queue.peek(num_batches * self._limits.max_batch_size)
        if not window:
            return None
        oldest_allowed = now - self._limits.max_age_seconds
        candidates, others = window, list[Item]()
        if window[0].due < oldest_allowed:
            candidates = [item for item in window if item.due < oldest_allowed]
        elif not all(item.is_bulk for item in window):
            latest = max(now, window[0].due)
            candidates = [item for item in window if item.due <= latest]
            others = window[len(candidates) :]
        size, max_tokens = min(self._limits.max_batch_size, self._count_share(num_takers)), self.max_tokens
        choose = _choose_first if self._grid.is_packed else self._choose_alike
        items, reason = choose(candidates, size, max_tokens)
        if reason == "tokens" and max_tokens < self._budget:
            reason = "latency"
        if reason == "size" and len(items) < self._limits.max_batch_size:
            reason = "queue"  # all that waits was divided
        if others and num_takers == 1:
            items = self._take_along(items, others, max_tokens)
        self.queue.remove(window, items, now)
        items = sorted(items, key=_length)
        num_tokens, length = sum(item.length for item in items), self._grid.round_length(items[-1].length)
        return Batch(
            items, reason, now, num_tokens, length, num_tokens if self._grid.is_packed else length * len(items)
        )

    def _count_share(self, num_takers: int) -> int:
        """How many of the texts that wait one of `num_takers` takes, and leaves something to the runs that end next."""
        count, model = len(self.queue), self.model
        tokens = _WORTHWHILE * (model.overhead_seconds + _START_SECONDS) / model.seconds_per_token
        worthwhile = tokens * count / max(1, self.queue.num_tokens)
        return min(-(-count // num_takers), max(-(-count // self._num_runs), math.ceil(worthwhile)))

    def _choose_alike(self, candidates: Sequence[Item], max_size: int, max_tokens: int) -> tuple[list[Item], str]:
        """Texts of like lengths around the first, and why no more."""
        ordered = sorted(candidates, key=_length)
        head, lengths = ordered.index(candidates[0]), [self._grid.round_length(item.length) for item in ordered]
        start, stop, reason = choose_run(lengths, head, max_size, max_tokens, self.model.overhead_tokens)
        size = self._grid.round_size(stop - start)
        start = max(start, head - size + 1)
        return ordered[start : start + size], reason

    def _take_along(self, items: list[Item], others: Sequence[Item], max_tokens: int) -> list[Item]:
        """Fill a run that is mostly overhead, at most to twice its time, with texts that make it no longer."""
        if self._grid.is_packed:
            room = min(max_tokens, int(self.model.overhead_tokens)) - sum(item.length for item in items)
            return items + _choose_first(others, self._limits.max_batch_size - len(items), room, at_least=0)[0]
        length = self._grid.round_length(items[-1].length)
        size = min(self._limits.max_batch_size, min(max_tokens, int(self.model.overhead_tokens)) // length)
        fitting = sorted((item for item in others if item.length <= length), key=_length)
        room = self._grid.round_size(min(size, len(items) + len(fitting))) - len(items)
        return items if room <= 0 else sorted([*items, *fitting[-room:]], key=_length)


def _choose_first(
    candidates: Sequence[Item], max_size: int, max_tokens: int, at_least: int = 1
) -> tuple[list[Item], str]:
    """The first texts, in their order, as many as fit, and why no more."""
    tokens = 0
    for count, item in enumerate(candidates):
        tokens += item.length
        if count >= max_size:
            return list(candidates[:count]), "size"
        if tokens > max_tokens and count >= at_least:
            return list(candidates[:count]), "tokens"
    return list(candidates), "queue"


def choose_run(
    lengths: Sequence[int], head: int, max_size: int, max_tokens: int, overhead_tokens: float
) -> tuple[int, int, str]:
    """Grow `lengths[start:stop]` (ascending) from `head`; returns (start, stop, why it ended).

    A single text longer than `max_tokens` still goes, alone.
    """
    start, stop, tokens = head, head + 1, lengths[head]
    while stop - start < max_size:
        count, padded = stop - start, lengths[stop - 1] * (stop - start)
        best, best_tokens, grown = tokens / (overhead_tokens + padded), 0, (start, stop)
        fits = False
        for candidate, edge in (((start - 1, stop), start - 1), ((start, stop + 1), stop)):
            if not 0 <= edge < len(lengths):
                continue
            cost = lengths[candidate[1] - 1] * (count + 1)
            if cost > max_tokens:
                continue
            fits = True
            rate = (tokens + lengths[edge]) / (overhead_tokens + cost)
            if rate >= best:
                best, best_tokens, grown = rate, tokens + lengths[edge], candidate
        if not best_tokens:
            return start, stop, _stop_reason(start, stop, len(lengths), fits)
        (start, stop), tokens = grown, best_tokens
    return start, stop, "size"


def _stop_reason(start: int, stop: int, total: int, fits: bool) -> str:
    if stop - start == total:
        return "queue"
    return "length" if fits else "tokens"


def _length(item: Item) -> int:
    return item.length
