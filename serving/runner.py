"""The engine's own thread: takes batches from the queue, runs them and hands the outcomes back.

The thread takes the next batch itself the moment the engine is free, so whatever arrived during a run shares the next
one. A batch that is already full cannot improve by waiting: `prefetch` forms and pads it while the engine still runs.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from serving.batcher import Batch, Batcher
from serving.engines import Embeddings, Engine
from serving.errors import EngineFailed
from serving.request_queue import FAIR_SHARE, Request
from serving.tokenizer import Ids, pad_batch

# Weight of the newest run in the measured tokens per second.
_RATE_WEIGHT = 0.1

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Outcome:
    """What became of a batch: row k of `vectors` [B, D] belongs to item k unless `failures` says why it has none."""

    batch: Batch
    vectors: Embeddings
    failures: dict[int, EngineFailed]
    engine_seconds: float


@dataclass(slots=True, eq=False)
class _Padded:
    batch: Batch
    input_ids: Ids
    attention_mask: Ids


class EngineRunner:
    """Owns the engine and the queue in front of it; `deliver` is called on the engine's thread, once per batch."""

    def __init__(
        self,
        engine: Engine,
        dimension: int,
        batcher: Batcher,
        deliver: Callable[[Outcome], None],
        *,
        tokens_per_second: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._dimension = engine, dimension
        self._batcher, self._deliver, self._clock = batcher, deliver, clock
        self._lock = threading.Lock()  # guards the batcher, its queue, _prefetched, _is_idle and _is_stopping
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._prefetched: _Padded | None = None
        self._is_idle = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.tokens_per_second = tokens_per_second
        self.busy_since: float | None = None

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread after the run it is in; False when it does not end in time."""
        with self._lock:
            self._is_stopping = True
        self._wake.put(None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def admit(self, num_coming: int = 0) -> None:
        """See `RequestQueue.admit`."""
        self._batcher.queue.admit(self.tokens_per_second, num_coming)

    def submit(self, request: Request, rows: Sequence[Ids], share: float = FAIR_SHARE) -> None:
        """Queue a request and wake the engine if it is idle."""
        with self._lock:
            self._batcher.queue.push(request, rows, self.tokens_per_second, share)
            wake, self._is_idle = self._is_idle, False
        if wake:
            self._wake.put(None)

    def prefetch(self) -> None:
        """Form and pad the next batch now if it is full and the engine is busy."""
        with self._lock:
            if self._is_idle or self._prefetched is not None or not self._batcher.is_full():
                return
            batch = self._batcher.take(self._clock())
            if batch is not None:
                self._prefetched = _Padded(batch, *batch.pad())

    def is_healthy(self, now: float, max_run_seconds: float) -> bool:
        """Whether the thread is alive and not stuck in one run for longer than `max_run_seconds`."""
        since = self.busy_since
        return self._thread.is_alive() and (since is None or now - since <= max_run_seconds)

    def _run(self) -> None:
        while True:
            padded = self._next()
            if padded is None:
                return
            self._deliver(self._compute(padded))

    def _next(self) -> _Padded | None:
        """The next batch; sleeps while there is none. None when stopping."""
        while True:
            with self._lock:
                if self._is_stopping:
                    return None
                if self._prefetched is not None:
                    padded, self._prefetched = self._prefetched, None
                    return padded
                now = self._clock()
                timeout = self._batcher.wait_seconds(now)
                batch = self._batcher.take(now) if timeout == 0 else None
                self._is_idle = batch is None
            if batch is not None:
                return _Padded(batch, *batch.pad())
            self._sleep(timeout)

    def _sleep(self, timeout: float | None) -> None:
        try:
            self._wake.get(timeout=timeout)
        except Empty:
            return

    def _compute(self, padded: _Padded) -> Outcome:
        started = self._clock()
        self.busy_since = started
        vectors, failures = run_isolated(
            self._engine, [item.ids for item in padded.batch.items], padded.input_ids, padded.attention_mask,
            self._dimension,
        )  # fmt: skip
        self.busy_since = None
        seconds = self._clock() - started
        if failures:
            reason = next(iter(failures.values()))
            _log.warning("engine failed reason=%r texts=%d of=%d", str(reason), len(failures), len(vectors))
        if seconds > 0 and not failures:
            rate = padded.batch.num_tokens / seconds
            self.tokens_per_second += _RATE_WEIGHT * (rate - self.tokens_per_second)
        return Outcome(padded.batch, vectors, failures, seconds)


def run_isolated(
    engine: Engine, rows: Sequence[Ids], input_ids: Ids, attention_mask: Ids, dimension: int
) -> tuple[Embeddings, dict[int, EngineFailed]]:
    """Run a batch; when it raises, run its halves, so that the text at fault fails alone.

    Returns vectors [B, D] and the failures by row; a failed row's vector is undefined.
    """
    try:
        vectors = engine.embed(input_ids, attention_mask)
    except Exception as error:  # an edge: vendors' errors share no base class, and may quote their input
        if len(rows) == 1:
            failed = EngineFailed(f"the engine raised {type(error).__name__} on this text")
            return np.zeros((1, dimension), dtype=np.float32), {0: failed}
        middle = len(rows) // 2
        first, failures = run_isolated(engine, rows[:middle], *pad_batch(rows[:middle]), dimension)
        second, more = run_isolated(engine, rows[middle:], *pad_batch(rows[middle:]), dimension)
        return np.concatenate((first, second)), failures | {middle + row: error for row, error in more.items()}
    if vectors.shape != (len(rows), dimension):
        failed = EngineFailed(f"the engine answered {vectors.shape}, expected {(len(rows), dimension)}")
        return np.zeros((len(rows), dimension), dtype=np.float32), dict.fromkeys(range(len(rows)), failed)
    return vectors, _find_non_finite(vectors)


def _find_non_finite(vectors: Embeddings) -> dict[int, EngineFailed]:
    finite = np.isfinite(vectors)
    if finite.all():
        return {}
    failed = EngineFailed("the engine returned a non-finite vector for this text")
    return {int(row): failed for row in np.flatnonzero(~finite.all(axis=1))}
