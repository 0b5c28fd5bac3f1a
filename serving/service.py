"""From texts to vectors, on the event loop: admission, tokenising, waiting, deadlines and disconnects of one model."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serving.admission import Admission
from serving.batcher import Batcher, Limits
from serving.containment import GuardedEngine
from serving.errors import DeadlineExceeded, EngineFailed, NotReady, Overloaded
from serving.latency_model import LatencyModel
from serving.metrics import ModelMetrics
from serving.models import LoadedModel
from serving.request_queue import Request, RequestQueue, put_rows
from serving.runner import EngineRunner, Outcome
from serving.settings import BatchingSettings, Settings, Sizes
from serving.texts import Accepted, Embedded, EmbedRequest, Receive, TextSide, watch_client
from serving.tokenizer import Ids
from serving.vector_cache import VectorCache

# Requests are looked at this often for a missed deadline or a client that hung up.
_PATROL_SECONDS = 0.05
_STOP_SECONDS = 1.0
# Part of the latency objective that one engine run may take: a newcomer waits for a run it missed, then for its own.
_RUN_SHARE = 0.125
# A full run has texts of so many large requests at most: each costs the event loop a copy.
_TURNS_PER_RUN = 16
_VALIDATION_WEIGHT = 0.04  # of the reference texts, against 1 of a client's request of many texts

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    waiter: "asyncio.Future[None]"
    receive: Receive | None
    watcher: "asyncio.Task[None] | None" = None


class EmbeddingService:
    """Answers embedding requests for one loaded model. Lives on one event loop."""

    def __init__(
        self,
        model: LoadedModel,
        settings: Settings,
        metrics: ModelMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.metrics = model, metrics
        self._timeout_seconds = settings.request_timeout_seconds
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        sizes = settings.batching.sizes(model.has_custom_kernels)
        self._queue = RequestQueue(sizes.queue_tokens, sizes.queue_size, -(-sizes.batch_size // _TURNS_PER_RUN))
        self._admission = Admission(settings.batching.latency_objective_ms / 1000)
        self._engine = GuardedEngine(
            model.engine,
            model.manifest.dimension,
            model.golden.rows[0],
            reopen=model.reopen,
            open_spare=model.open_spare,
            on_event=metrics.count_engine_event,
        )
        limits = _limit_runs(settings.batching, sizes)
        self._runner = EngineRunner(
            self._engine,
            Batcher(self._queue, limits, LatencyModel(model.cost.runs), model.grid, model.num_computing),
            self._deliver_threadsafe,
            num_threads=model.choice.large.num_instances,
            num_computing=model.num_computing,
            clock=clock,
        )
        self._cache = VectorCache(settings.cache_bytes)
        self._texts = TextSide(model)
        self._accepted = Accepted()  # from the moment they come in
        self._is_freed = False
        self._waiting: dict[Request, _Waiting] = {}  # in order of arrival, so in order of deadline
        self._num_entering = 0  # requests that `turn_away` let through and that are not in the queue yet
        self._entering_seconds = 0.0  # that the last of them was predicted to wait
        self._patrol_timer: asyncio.TimerHandle | None = None
        metrics.watch_queue(lambda: float(len(self._queue)), lambda: float(self._queue.num_tokens))

    def start(self) -> None:
        """Start the engine's threads."""
        self._runner.start()

    def close(self) -> None:
        """End the threads and free the engine; a stuck engine is left to the end of the process."""
        if self._patrol_timer is not None:
            self._patrol_timer.cancel()
        self._free()

    async def retire(self) -> None:
        """Return once every request it was given is answered and the engine is freed; the loop goes on meanwhile."""
        await self._accepted.wait()
        if self._patrol_timer is not None:
            self._patrol_timer.cancel()
        await self._loop.run_in_executor(None, self._free)

    def _free(self) -> None:
        if self._is_freed:
            return
        self._is_freed = True
        self._texts.close()
        if self._runner.stop(_STOP_SECONDS):
            self._engine.close()

    def is_healthy(self) -> bool:
        """Whether there is an engine, its threads are alive and every run ends within the request timeout."""
        return self._runner.is_healthy(self._timeout_seconds)

    @property
    def num_accepted(self) -> int:
        """Requests that are not answered yet."""
        return self._accepted.count

    async def embed(self, request: EmbedRequest, receive: Receive | None = None) -> Embedded:
        """Vectors of the request's texts; `receive` tells of a client that hangs up.

        Raises Overloaded, RequestTooLarge, InputTooLong, InvalidRequest, EngineFailed, DeadlineExceeded, NotReady or
        ClientGone.
        """
        self._texts.check(request)
        arrival = self._clock()
        predicted_seconds = self._enter(len(request.texts))
        with self._accepted:
            rows, has_waited = await self._texts.tokenise(request)
            if has_waited:
                self._admit(len(rows))  # others may have filled the queue meanwhile
            embedded = await self._embed_accepted(rows, arrival, receive, predicted_seconds)
        return self._texts.finish(request, embedded)

    async def embed_rows(self, rows: Sequence[Ids], arrival: float) -> Embedded:
        """Vectors of texts that a front process tokenised for a request that came to it at `arrival`.

        Cancelled when its client hangs up. Raises as `embed` does.
        """
        predicted_seconds = self._enter(len(rows))
        with self._accepted:
            return await self._embed_accepted(rows, arrival, None, predicted_seconds)

    def _enter(self, num_texts: int) -> float:
        """As `_admit`, unless there is no engine. Raises NotReady or Overloaded."""
        if not self._runner.can_answer(self._timeout_seconds):
            raise NotReady("the engine does not answer and cannot be opened anew: the worker needs a restart")
        return self._admit(num_texts)

    async def _embed_accepted(
        self, rows: Sequence[Ids], arrival: float, receive: Receive | None, predicted_seconds: float
    ) -> Embedded:
        embedded = await self.embed_ids(rows, arrival, receive, use_cache=True)
        if len(rows) == 1:
            self._admission.observe(predicted_seconds, self._clock() - arrival)
        return embedded

    async def embed_ids(
        self,
        rows: Sequence[Ids],
        arrival: float,
        receive: Receive | None = None,
        weight: float = 1.0,
        use_cache: bool = False,
    ) -> Embedded:
        """Vectors of tokenised texts; those that the cache has are asked of the engine unless `use_cache`.

        Raises as `embed` does.
        """
        submitted = self._clock()
        waiter: asyncio.Future[None] = self._loop.create_future()
        pending = Request(len(rows), self.model.manifest.dimension, arrival, waiter)
        recalled = self._recall(pending, rows) if use_cache else ()
        if len(recalled) < len(rows):
            await self._wait(pending, waiter, rows, receive, weight, recalled)
        wait_seconds = self._clock() - submitted
        engine_seconds = min(pending.engine_seconds, wait_seconds)
        num_tokens = sum(map(len, rows))
        return Embedded(pending.vectors, num_tokens, submitted - arrival, wait_seconds - engine_seconds, engine_seconds)

    async def _wait(
        self,
        pending: Request,
        waiter: "asyncio.Future[None]",
        rows: Sequence[Ids],
        receive: Receive | None,
        weight: float,
        recalled: Collection[int],
    ) -> None:
        if len(rows) > 1:
            self._check_size(rows, recalled)
        waiting = self._waiting[pending] = _Waiting(pending, waiter, receive)
        if self._patrol_timer is None:
            self._patrol_timer = self._loop.call_later(_PATROL_SECONDS, self._patrol)
        num_shared = self._runner.submit(pending, rows, weight, recalled)
        if num_shared:
            self.metrics.count_shared(num_shared)
        self._runner.prefetch()
        try:
            await waiter
        finally:
            del self._waiting[pending]
            waiter.cancel()  # when we were cancelled ourselves, the queue must see that nobody waits
            if waiting.watcher is not None:
                waiting.watcher.cancel()

    def _check_size(self, rows: Sequence[Ids], recalled: Collection[int]) -> None:
        """Raises RequestTooLarge where the timeout is certain: by the tokens alone, without any padding."""
        if self._runner.predict(sum(map(len, rows))) <= self._timeout_seconds:
            return
        distinct = {ids.tobytes(): len(ids) for index, ids in enumerate(rows) if index not in recalled}
        num_tokens = sum(distinct.values())
        self._admission.check_size(num_tokens, self._runner.predict(num_tokens), self._timeout_seconds)

    def _recall(self, pending: Request, rows: Sequence[Ids]) -> Collection[int]:
        """Put the vectors that the cache has in their places; returns which."""
        if not self._cache.max_bytes:
            return ()
        recalled = set()
        for index, ids in enumerate(rows):
            vector = self._cache.get(ids)
            if vector is not None:
                pending.put(index, vector)
                recalled.add(index)
        self.metrics.count_cache(len(recalled), len(rows) - len(recalled))
        return recalled

    def _admit(self, num_texts: int) -> float:
        """Seconds until the first text of a request that arrives now is predicted to be answered. Raises Overloaded."""
        is_bulk = num_texts > 1
        if self._num_entering and not is_bulk:  # `turn_away` has looked
            self._num_entering -= 1
            return self._entering_seconds
        backlog = self._runner.backlog(is_bulk, self._texts.num_tokenising if is_bulk else 0)
        self._admission.check(backlog, self._clock())
        return backlog.seconds

    def standing_refusal(self) -> Overloaded | None:
        """See `StandingRefusal`."""
        return self._admission.standing.get(self._clock())

    def is_flooded(self) -> bool:
        """Whether it pays to ask `turn_away`."""
        return self._admission.is_flooded(self._clock())

    def turn_away(self) -> Overloaded | None:
        """Why a request of one text that comes now is refused, whatever it asks; None: read it.

        Asked in a flood, before the request's task is made. Many are read at once, before the first of them is in the
        queue: those that were let through just now are counted as waiting.
        """
        now = self._clock()
        refusal = self._admission.standing.get(now)
        if refusal is not None:
            return refusal
        backlog = self._runner.backlog(is_bulk=False)
        entering_tokens = self._num_entering * backlog.tokens / max(1, backlog.size)
        backlog = replace(backlog, seconds=backlog.seconds + self._runner.predict(entering_tokens))
        try:
            self._admission.check(backlog, now)
        except Overloaded as error:
            return error
        if self._num_entering == 0:  # behind the tasks of all that are read now
            self._loop.call_soon(self._loop.call_soon, self._forget_entering)
        self._num_entering += 1
        self._entering_seconds = backlog.seconds
        return None

    def _forget_entering(self) -> None:
        self._num_entering = 0

    async def validate(self) -> NDArray[np.float64]:
        """Cosine of each reference text's live embedding with the teacher's, behind whatever clients ask for."""
        golden = self.model.golden
        self._admit(len(golden.rows))
        with self._accepted:
            embedded = await self.embed_ids(golden.rows, self._clock(), weight=_VALIDATION_WEIGHT)
        live = embedded.vectors.astype(np.float64)
        scale = np.linalg.norm(live, axis=1) * np.linalg.norm(golden.embeddings.astype(np.float64), axis=1)
        cosines: NDArray[np.float64] = (live * golden.embeddings).sum(axis=1) / np.maximum(scale, np.finfo(float).tiny)
        return cosines

    def _deliver_threadsafe(self, outcome: Outcome) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, outcome)
        except RuntimeError:
            _log.debug("the event loop is closed, a batch is dropped size=%d", len(outcome.batch.items))

    def _deliver(self, outcome: Outcome) -> None:
        """Hand the rows of a batch to their requests."""
        self._admission.standing.drop()
        self._runner.prefetch()
        batch, vectors, failures = outcome.batch, outcome.vectors, outcome.failures
        self._runner.forget(batch.items)
        for row, failure in failures.items():
            batch.items[row].fail(EngineFailed, str(failure))
        for request in put_rows(batch.items, vectors, failures):
            request.engine_seconds += outcome.engine_seconds
        if self._cache.max_bytes:
            for row, item in enumerate(batch.items):
                if row not in failures:
                    self._cache.put(item.ids, vectors[row])
        oldest = min(batch.formed_at, *(item.arrival for item in batch.items))
        self.metrics.count_batch(
            batch.reason, len(batch.items), batch.num_tokens, batch.padded_tokens, batch.formed_at - oldest
        )
        self.metrics.count_engine_run(outcome.engine_seconds, batch.padded_tokens)
        if failures:
            self.metrics.count_failed_texts(len(failures))

    def _patrol(self) -> None:
        """Fail requests past their deadline; watch the clients of those that have waited a while.

        A quick request pays for neither a timer nor a watcher of its own.
        """
        self._patrol_timer = None
        now = self._clock()
        for item in self._runner.replace_stuck(self._timeout_seconds):
            item.fail(DeadlineExceeded, f"the engine did not answer within {self._timeout_seconds:g} s")
        for waiting in self._waiting.values():
            age = now - waiting.request.arrival
            if age >= self._timeout_seconds:
                waiting.request.fail(DeadlineExceeded(f"no answer within {self._timeout_seconds:g} s"))
            elif age < _PATROL_SECONDS:
                break  # those behind it are younger still
            elif waiting.watcher is None and waiting.receive is not None:
                waiting.watcher = self._loop.create_task(watch_client(waiting.receive, waiting.request.fail))
        if self._waiting or self._runner.is_busy:  # a run that hangs may have no client left
            self._patrol_timer = self._loop.call_later(_PATROL_SECONDS, self._patrol)


def _limit_runs(settings: BatchingSettings, sizes: Sizes) -> Limits:
    return Limits(
        sizes.batch_size,
        sizes.batch_tokens,
        settings.max_wait_time_ms / 1000,
        max_run_seconds=_RUN_SHARE * settings.latency_objective_ms / 1000 if settings.adaptive else math.inf,
    )
