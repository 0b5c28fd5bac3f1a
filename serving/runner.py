"""The engine's own threads: they take batches from the queue, run them and hand the outcomes back.

A thread takes the next batch itself the moment its engine is free, so whatever arrived during a run shares the next
one. A batch that is full of texts which nothing can overtake cannot improve by waiting: `prefetch` forms and pads it
while the engines still run.
An engine may take more batches than it computes at a time, so that the next is there when one ends. Until then others
may come to share it, so only a full one is given early.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from serving.admission import Backlog
from serving.batcher import Batch, Batcher
from serving.containment import GuardedEngine
from serving.engines import Embeddings
from serving.errors import EngineFailed
from serving.latency_model import Run
from serving.request_queue import Item, Request
from serving.tokenizer import Ids

# Weight of the newest run in the measured part of padding.
_PADDING_WEIGHT = 0.05
# A dead engine that cannot be opened is tried again after this, then after twice as long, up to the second.
_REVIVE_SECONDS = (1.0, 30.0)
# Engines that may hang for good, each with its memory, before only a restart helps.
_MAX_ABANDONED = 2

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Outcome:
    """What became of a batch: row k of `vectors` [B, D] belongs to item k unless `failures` says why it has none.

    `engine_seconds` are those in which it was the engine's turn, not those in which it waited there for another.
    """

    batch: Batch
    vectors: Embeddings
    failures: dict[int, EngineFailed]
    engine_seconds: float


@dataclass(slots=True, eq=False)
class _Padded:
    batch: Batch
    input_ids: Ids
    attention_mask: Ids


class _Lane:
    """A thread that runs batches, and what it is doing."""

    def __init__(self, body: Callable[["_Lane"], None]) -> None:
        self.batch: Batch | None = None
        self.busy_since: float | None = None
        self.generation = 0  # of the engine that has its batch
        self.is_abandoned = False
        self.thread = threading.Thread(target=body, args=(self,), name="engine", daemon=True)

    def begin(self, batch: Batch, now: float, generation: int = 0) -> None:
        self.batch, self.busy_since, self.generation = batch, now, generation

    def end(self) -> None:
        self.batch = self.busy_since = None


class EngineRunner:
    """Owns the queue and the threads that empty it; `deliver` is called on such a thread, once per batch."""

    def __init__(
        self,
        engine: GuardedEngine,
        batcher: Batcher,
        deliver: Callable[[Outcome], None],
        *,
        num_threads: int = 1,
        num_computing: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`num_threads` batches are given to the engine at the same time, which computes all of them (0) or one."""
        self._engine, self._batcher, self._deliver, self._clock = engine, batcher, deliver, clock
        self._lock = threading.Lock()  # guards the batcher, its queue and model, _prefetched, the lanes' batches
        # Threads that may start at once wait for the first, those whose run would be an early one for the second: a
        # condition wakes who waits longest, and lone texts are to find the thread that had the last one.
        self._ready, self._early = threading.Condition(self._lock), threading.Condition(self._lock)
        self._prefetched: _Padded | None = None
        self._num_computing = num_computing or num_threads
        self._last_end = -math.inf  # where one run waits for another
        self._num_idle = self._num_parked = 0  # threads that wait for the one and the other
        self._generation = 0  # of the engine: one that hangs is left to its threads, and another opened
        self._abandoned: set[_Lane] = set()
        self._padding = 1.0  # tokens computed per token asked for
        self._is_stopping = threading.Event()
        self._lanes = [_Lane(self._run) for _ in range(num_threads)]

    def start(self) -> None:
        """Start the threads."""
        for lane in self._lanes:
            lane.thread.start()

    def stop(self, timeout_seconds: float) -> bool:
        """End the threads after the runs they are in; False when one does not end in time."""
        deadline = time.monotonic() + timeout_seconds
        with self._ready:
            self._is_stopping.set()
            self._ready.notify_all()
            self._early.notify_all()
        for lane in self._lanes:
            lane.thread.join(max(0.0, deadline - time.monotonic()))
        return not any(lane.thread.is_alive() for lane in self._lanes)

    @property
    def tokens_per_second(self) -> float:
        """What the engine does on full batches, padding included."""
        tokens = max(1, self._batcher.max_tokens)
        return self._num_computing * tokens / self._batcher.model.predict(tokens)

    def backlog(self, is_bulk: bool, num_coming: int = 0) -> Backlog:
        """What a text that arrives now finds before it, or the first of many.

        `num_coming` texts are admitted but not yet tokenised.
        """
        now, batcher = self._clock(), self._batcher
        queue, model = batcher.queue, batcher.model
        with self._lock:
            seconds = self._remaining(now)
            due_tokens = queue.count_due_tokens(now)
            padded = due_tokens * self._padding
            if self._prefetched is not None:
                due_tokens += self._prefetched.batch.num_tokens
                seconds += model.predict(self._prefetched.batch.padded_tokens)
            seconds = seconds / self._num_computing + self.predict(padded)
            return Backlog(len(queue), queue.num_tokens, queue.is_full(is_bulk, num_coming), due_tokens, seconds)

    def predict(self, num_tokens: float) -> float:
        """Seconds that the engine takes for that many tokens, padding included, in runs of full size."""
        model = self._batcher.model
        num_runs = 1 + num_tokens // max(1, self._batcher.max_tokens)
        return (num_runs * model.overhead_seconds + num_tokens * model.seconds_per_token) / self._num_computing

    def submit(self, request: Request, rows: Sequence[Ids], weight: float = 1.0, recalled: Collection[int] = ()) -> int:
        """Queue a request and wake an idle thread; see `RequestQueue.push`."""
        with self._ready:
            num_shared = self._batcher.queue.push(request, rows, self.tokens_per_second, weight, recalled)
            if self._num_free:
                (self._ready if self._num_idle else self._early).notify(len(rows))
            else:
                self._wake_early()
        return num_shared

    @property
    def _num_free(self) -> int:
        """Runs that would be computed at once."""
        return max(0, self._num_computing - sum(lane.batch is not None for lane in self._lanes))

    def _wake_early(self) -> None:
        if self._num_parked + self._num_idle and self._batcher.is_full():
            (self._early if self._num_parked else self._ready).notify()

    def forget(self, items: Sequence[Item]) -> None:
        """See `RequestQueue.forget`."""
        with self._lock:
            self._batcher.queue.forget(items)

    def prefetch(self) -> None:
        """Form and pad the next batch now if it is settled and every thread is busy."""
        with self._lock:
            has_thread = self._num_idle or self._num_parked
            if has_thread or self._prefetched is not None or not self._batcher.is_settled():
                return
            batch = self._batcher.take(self._clock())
            if batch is not None:
                self._prefetched = _Padded(batch, *batch.pad())

    def is_healthy(self, max_run_seconds: float) -> bool:
        """Whether there is an engine, every thread is alive and none is in one run for longer than that."""
        if self._engine.is_dead or self._is_stopping.is_set():
            return False
        return all(lane.thread.is_alive() for lane in self._lanes) and not self._stuck(max_run_seconds)

    @property
    def is_busy(self) -> bool:
        """Whether a thread is in a run."""
        return any(lane.busy_since is not None for lane in self._lanes)

    def can_answer(self, max_run_seconds: float) -> bool:
        """Whether a request let in now has a chance: an engine that is being opened anew counts."""
        return not self._engine.is_broken and not self._stuck(max_run_seconds)

    def replace_stuck(self, max_run_seconds: float) -> list[Item]:
        """Give threads that hang in a run up and start others, with a new engine; returns what the former had.

        Nothing happens while too many hang already, or when no other engine can be opened.
        """
        items: list[Item] = []
        while True:
            with self._lock:
                stuck = self._stuck(max_run_seconds)[:1]
                if not stuck or not self._leave_engine(stuck[0].generation):
                    return items
                if self._shares_engine:  # what was given to the engine after that hangs behind it
                    stuck = [lane for lane in self._lanes if lane.batch is not None]
                successors = [self._replace(lane) for lane in stuck]
                items += [item for lane in stuck if lane.batch is not None for item in lane.batch.items]
                self._batcher.queue.forget(items)
            _log.error("engine hangs seconds=%g abandoned=%d", max_run_seconds, self._count_hanging())
            for successor in successors:
                successor.thread.start()

    def _leave_engine(self, generation: int) -> bool:
        """Whether there is, or can be, another engine than that one."""
        if generation == self._generation:
            if self._count_hanging() == _MAX_ABANDONED or not self._engine.abandon():
                return False
            self._generation += 1
        return True

    def _count_hanging(self) -> int:
        return len({lane.generation for lane in self._abandoned})

    def _replace(self, lane: _Lane) -> _Lane:
        lane.is_abandoned = True
        self._abandoned.add(lane)
        self._lanes[self._lanes.index(lane)] = successor = _Lane(self._run)
        return successor

    def _stuck(self, max_run_seconds: float) -> list[_Lane]:
        now = self._clock()
        return [
            lane for lane in self._lanes if (since := lane.busy_since) is not None and now - since > max_run_seconds
        ]

    @property
    def _shares_engine(self) -> bool:
        """Whether one of its runs waits for another."""
        return self._num_computing < len(self._lanes)

    def _remaining(self, now: float) -> float:
        """Seconds of the engine that the runs which go on will take, all together."""
        runs = sorted(
            (lane.busy_since, self._batcher.model.predict(lane.batch.padded_tokens))
            for lane in self._lanes
            if lane.batch is not None and lane.busy_since is not None
        )
        computed = [max(0.0, seconds - (now - self._start(since))) for since, seconds in runs[: self._num_computing]]
        return sum(computed) + sum(seconds for _, seconds in runs[self._num_computing :])

    def _start(self, given: float) -> float:
        """When the engine began with a run that it was given at `given`, the first of those that go on."""
        return max(given, self._last_end) if self._shares_engine else given

    def _run(self, lane: _Lane) -> None:
        while self._revive() and (padded := self._next(lane)) is not None:
            outcome = self._compute(lane, padded)
            if lane.is_abandoned:  # it came back after all: its requests are answered, its successor works
                with self._lock:
                    self._abandoned.discard(lane)
                return
            self._deliver(outcome)

    def _revive(self) -> bool:
        """Return once there is an engine; False when stopping."""
        seconds, longest = _REVIVE_SECONDS
        while self._engine.is_dead and not self._engine.revive():
            if self._is_stopping.wait(seconds):
                return False
            seconds = min(2 * seconds, longest)
        return True

    def _next(self, lane: _Lane) -> _Padded | None:
        """The next batch; sleeps while there is none. None when stopping."""
        with self._ready:
            while not self._is_stopping.is_set():
                now = self._clock()
                padded, self._prefetched = self._prefetched, None
                if padded is not None:
                    lane.begin(padded.batch, now, self._generation)
                    return padded
                num_free = self._num_free
                timeout = self._batcher.wait_seconds(now) if num_free or self._batcher.is_full() else None
                num_takers = max(1, min(1 + self._num_idle, num_free))
                if timeout == 0 and (batch := self._batcher.take(now, num_takers)) is not None:
                    lane.begin(batch, now, self._generation)
                    self._wake_early()
                    break
                if timeout != 0:
                    self._sleep(timeout)
            else:
                return None
        return _Padded(batch, *batch.pad())

    def _sleep(self, timeout: float | None) -> None:
        """Until a run may start; the engine's last threads until an early one may."""
        if timeout is not None or self._num_idle < self._num_computing:
            self._num_idle += 1
            self._ready.wait(timeout)
            self._num_idle -= 1
        else:
            self._num_parked += 1
            self._early.wait()
            self._num_parked -= 1

    def _compute(self, lane: _Lane, padded: _Padded) -> Outcome:
        batch, given = padded.batch, self._clock() if lane.busy_since is None else lane.busy_since
        vectors, failures = self._engine.run(
            [item.ids for item in batch.items], padded.input_ids, padded.attention_mask
        )
        with self._lock:
            now = self._clock()
            seconds = now - self._start(given)
            lane.end()
            if not lane.is_abandoned:
                self._last_end = now
            self._batcher.limit_tokens(self._engine.memory_limit_tokens)
            if seconds > 0 and not failures and not lane.is_abandoned:
                self._batcher.model.observe(Run(batch.padded_tokens, seconds))
                self._padding += _PADDING_WEIGHT * (batch.padded_tokens / batch.num_tokens - self._padding)
        if failures:
            reason = next(iter(failures.values()))
            _log.warning("engine failed reason=%r texts=%d of=%d", str(reason), len(failures), len(vectors))
        return Outcome(batch, vectors, failures, seconds)
