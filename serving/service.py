"""From texts to vectors, on the event loop: admission, tokenising, waiting, deadlines and disconnects of one model."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.batcher import Batcher, Limits
from serving.errors import ClientGone, DeadlineExceeded, EngineFailed, InvalidRequest, NotReady
from serving.metrics import ModelMetrics
from serving.models import LoadedModel
from serving.request_queue import FAIR_SHARE, Request, RequestQueue
from serving.runner import EngineRunner, Outcome
from serving.settings import Settings
from serving.tokenizer import Ids

# Tokenising this much takes under 1 ms; more goes to a thread, so that the loop stays free.
_INLINE_CHARS = 4096
_INLINE_TEXTS = 16
# Requests are looked at this often for a missed deadline or a client that hung up.
_PATROL_SECONDS = 0.05
_STOP_SECONDS = 1.0
_VALIDATION_SHARE = 0.01  # of the engine's rate, against FAIR_SHARE of a client's request

Receive = Callable[[], Awaitable[Any]]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class EmbedRequest:
    """What every dialect asks for. `param` is the field the texts came in, for error messages.

    `truncate_left` drops the beginning of a text that is too long; `normalize` is None where the model decides.
    """

    texts: list[str]
    is_single: bool
    param: str
    model: str | None = None
    dimensions: int | None = None
    as_base64: bool = False
    truncate: bool = True
    truncate_left: bool = False
    normalize: bool | None = None
    prompt: str | None = None


@dataclass(slots=True)
class Embedded:
    """Vectors in the order of the texts, float32 [N, D], contiguous, the tokens they took and where the time went."""

    vectors: NDArray[np.float32]
    num_tokens: int
    tokenize_seconds: float
    queue_seconds: float
    engine_seconds: float


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
        limits = settings.batching
        self._queue = RequestQueue(limits.max_queue_tokens, limits.max_queue_size)
        self._runner = EngineRunner(
            model.engine,
            model.manifest.dimension,
            Batcher(
                self._queue,
                Limits(limits.max_batch_size, limits.max_batch_tokens, limits.max_wait_time_ms / 1000),
                model.cost.overhead_tokens,
            ),
            self._deliver_threadsafe,
            tokens_per_second=model.cost.tokens_per_second,
            clock=clock,
        )
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")
        self._num_tokenising = 0
        self._num_accepted = 0  # requests not answered yet, from the moment they come in
        self._answered = asyncio.Event()
        self._is_freed = False
        self._waiting: dict[Request, _Waiting] = {}  # in order of arrival, so in order of deadline
        self._patrol_timer: asyncio.TimerHandle | None = None
        metrics.watch_queue(lambda: float(len(self._queue)), lambda: float(self._queue.num_tokens))

    def start(self) -> None:
        """Start the engine's thread."""
        self._runner.start()

    def close(self) -> None:
        """End the threads and free the engine; a stuck engine is left to the end of the process."""
        if self._patrol_timer is not None:
            self._patrol_timer.cancel()
        self._free()

    async def retire(self) -> None:
        """Return once every request it was given is answered and the engine is freed; the loop goes on meanwhile."""
        while self._num_accepted:
            self._answered.clear()
            await self._answered.wait()
        if self._patrol_timer is not None:
            self._patrol_timer.cancel()
        await self._loop.run_in_executor(None, self._free)

    def _free(self) -> None:
        if self._is_freed:
            return
        self._is_freed = True
        self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)
        if self._runner.stop(_STOP_SECONDS):
            self.model.engine.close()

    def is_healthy(self) -> bool:
        """Whether the engine's thread is alive and answers within the request timeout."""
        return self._runner.is_healthy(self._clock(), self._timeout_seconds)

    @property
    def num_accepted(self) -> int:
        """Requests that are not answered yet."""
        return self._num_accepted

    @contextmanager
    def _accepted(self) -> Iterator[None]:
        self._num_accepted += 1
        try:
            yield
        finally:
            self._num_accepted -= 1
            if not self._num_accepted:
                self._answered.set()

    async def embed(self, request: EmbedRequest, receive: Receive | None = None) -> Embedded:
        """Vectors of the request's texts; `receive` tells of a client that hangs up.

        Raises Overloaded, InputTooLong, InvalidRequest, EngineFailed, DeadlineExceeded, NotReady or ClientGone.
        """
        dimension = self.model.manifest.dimension
        if request.dimensions is not None and not 1 <= request.dimensions <= dimension:
            raise InvalidRequest(f"dimensions is {request.dimensions}, limits 1 and {dimension}", "dimensions")
        is_normal = self.model.manifest.normalize
        if request.normalize is False and is_normal:
            raise InvalidRequest("normalize must be true: this model's engine normalises its vectors", "normalize")
        if not self.is_healthy():
            raise NotReady("the engine does not answer: the worker needs a restart")
        arrival = self._clock()
        self._runner.admit(self._num_tokenising)
        with self._accepted():
            rows = await self._tokenise(request)
            embedded = await self.embed_ids(rows, arrival, receive)
        if (request.dimensions or dimension) < dimension or (request.normalize and not is_normal):
            embedded.vectors = shorten(embedded.vectors, request.dimensions or dimension)
        return embedded

    async def embed_ids(
        self, rows: Sequence[Ids], arrival: float, receive: Receive | None = None, share: float = FAIR_SHARE
    ) -> Embedded:
        """Vectors of tokenised texts. Raises as `embed` does."""
        submitted = self._clock()
        waiter: asyncio.Future[None] = self._loop.create_future()
        pending = Request(len(rows), self.model.manifest.dimension, arrival, waiter)
        waiting = self._waiting[pending] = _Waiting(pending, waiter, receive)
        if self._patrol_timer is None:
            self._patrol_timer = self._loop.call_later(_PATROL_SECONDS, self._patrol)
        self._runner.submit(pending, rows, share)
        self._runner.prefetch()
        try:
            await waiter
        finally:
            del self._waiting[pending]
            waiter.cancel()  # when we were cancelled ourselves, the queue must see that nobody waits
            if waiting.watcher is not None:
                waiting.watcher.cancel()
        wait_seconds = self._clock() - submitted
        engine_seconds = min(pending.engine_seconds, wait_seconds)
        num_tokens = sum(map(len, rows))
        return Embedded(pending.vectors, num_tokens, submitted - arrival, wait_seconds - engine_seconds, engine_seconds)

    async def validate(self) -> NDArray[np.float64]:
        """Cosine of each reference text's live embedding with the teacher's, behind whatever clients ask for."""
        golden = self.model.golden
        self._runner.admit(self._num_tokenising)
        with self._accepted():
            embedded = await self.embed_ids(golden.rows, self._clock(), share=_VALIDATION_SHARE)
        live = embedded.vectors.astype(np.float64)
        scale = np.linalg.norm(live, axis=1) * np.linalg.norm(golden.embeddings.astype(np.float64), axis=1)
        cosines: NDArray[np.float64] = (live * golden.embeddings).sum(axis=1) / np.maximum(scale, np.finfo(float).tiny)
        return cosines

    async def _tokenise(self, request: EmbedRequest) -> list[Ids]:
        """Ids of the texts, inline when that is quick, else in a thread so that the loop stays free."""
        texts = request.texts
        if request.prompt is not None:
            prefix = self._prompt(request.prompt)
            texts = [prefix + text for text in texts]
        tokenizer = self.model.tokenizer
        if len(texts) <= _INLINE_TEXTS and sum(map(len, texts)) <= _INLINE_CHARS:
            return tokenizer.encode(texts, request.truncate, request.param, request.truncate_left)
        self._num_tokenising += len(texts)
        try:
            rows = await self._loop.run_in_executor(
                self._tokenizer_thread,
                tokenizer.encode,
                texts,
                request.truncate,
                request.param,
                request.truncate_left,
            )
        finally:
            self._num_tokenising -= len(texts)
        self._runner.admit(self._num_tokenising)  # others may have filled the queue meanwhile
        return rows

    def _prompt(self, name: str) -> str:
        prompts = self.model.manifest.prompts
        if name not in prompts:
            raise InvalidRequest(f"the model has no such prompt, it has {sorted(prompts)}", "prompt")
        return prompts[name]

    def _deliver_threadsafe(self, outcome: Outcome) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, outcome)
        except RuntimeError:
            _log.debug("the event loop is closed, a batch is dropped size=%d", len(outcome.batch.items))

    def _deliver(self, outcome: Outcome) -> None:
        """Hand the rows of a batch to their requests."""
        self._runner.prefetch()
        batch, vectors, failures = outcome.batch, outcome.vectors, outcome.failures
        oldest = batch.formed_at
        for request in {item.request for item in batch.items}:
            request.engine_seconds += outcome.engine_seconds
        for row, item in enumerate(batch.items):
            oldest = min(oldest, item.request.arrival)
            if row in failures:
                item.request.fail(EngineFailed(f"text {item.index}: {failures[row]}"))
            else:
                item.request.put(item.index, vectors[row])
        self.metrics.count_batch(
            batch.reason, len(batch.items), batch.num_tokens, batch.padded_tokens, batch.formed_at - oldest
        )
        self.metrics.count_engine_run(outcome.engine_seconds)

    def _patrol(self) -> None:
        """Fail requests past their deadline; watch the clients of those that have waited a while.

        A quick request pays for neither a timer nor a watcher of its own.
        """
        self._patrol_timer = None
        now = self._clock()
        for waiting in self._waiting.values():
            age = now - waiting.request.arrival
            if age >= self._timeout_seconds:
                waiting.request.fail(DeadlineExceeded(f"no answer within {self._timeout_seconds:g} s"))
            elif age < _PATROL_SECONDS:
                break  # those behind it are younger still
            elif waiting.watcher is None and waiting.receive is not None:
                waiting.watcher = self._loop.create_task(_watch(waiting.receive, waiting.request))
        if self._waiting:
            self._patrol_timer = self._loop.call_later(_PATROL_SECONDS, self._patrol)


async def _watch(receive: Receive, request: Request) -> None:
    """Give the request up when its client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    request.fail(ClientGone())


def shorten(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """The first `dimensions` values of each vector, scaled to unit length again."""
    cut = np.ascontiguousarray(vectors[:, :dimensions])
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    shortened: NDArray[np.float32] = cut / np.maximum(norms, np.finfo(np.float32).tiny)
    return shortened
