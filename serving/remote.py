"""The engine process as a front process sees it: one stream, and a service for each version that is served."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.manifest import Manifest
from serving.admission import StandingRefusal
from serving.errors import STATUS, NotReady, Overloaded, RequestTooLarge, ServingError
from serving.frames import (
    MAX_FRAME_BYTES,
    Failure,
    Frame,
    FrameReader,
    Kind,
    ModelDocument,
    Payload,
    StreamBroken,
    Table,
    decode_document,
    decode_vectors,
    encode_embed,
    frame_bytes,
    pack,
)
from serving.served import Served
from serving.settings import Settings
from serving.tally import ModelTally, Tally
from serving.texts import Accepted, Embedded, EmbedRequest, Receive, TextSide, watch_client
from serving.tokenizer import TextTokenizer
from serving.versions import ModelVersions

# A client is watched only when its request has waited this long: most are quicker.
_WATCH_SECONDS = 0.05
_ERRORS: dict[str, type[ServingError]] = {kind.__name__: kind for kind in STATUS}

_log = logging.getLogger(__name__)


class EngineLink(asyncio.Protocol):
    """The stream to the engine process. Lives on one event loop."""

    def __init__(self, on_news: Callable[[Frame], None], on_lost: Callable[[], None]) -> None:
        """`on_news` hears of every model and table, `on_lost` of the stream's end."""
        self._on_news, self._on_lost = on_news, on_lost
        self._reader = FrameReader()
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._transport: Any = None
        self._closed = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        """The stream is there."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand each frame to who waits for it."""
        try:
            for frame in self._reader.feed(data):
                if frame.kind in (Kind.MODEL, Kind.TABLE):
                    self._on_news(frame)
                elif frame.kind in (Kind.VECTORS, Kind.FAILURE, Kind.ANSWER):
                    waiter = self._waiting.get(frame.subject)
                    if waiter is not None and not waiter.done():  # else nobody waits any more
                        waiter.set_result(frame)
                else:
                    raise StreamBroken(f"a frame of kind {frame.kind.name} from the engine process")
        except StreamBroken as error:
            self.break_off(error)

    def break_off(self, error: StreamBroken) -> None:
        """End a stream that makes no sense."""
        _log.error("the stream to the engine process is closed reason=%s", error)
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody will answer."""
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(NotReady("the engine process has ended"))
        self._closed.set()
        self._on_lost()

    async def close(self) -> None:
        """Send what is left and end the stream."""
        self._transport.close()
        await self._closed.wait()

    def send(self, kind: Kind, subject: int = 0, *parts: Payload) -> None:
        """Send a frame, unless the stream has ended."""
        if not self._transport.is_closing():
            self._transport.write(pack(kind, subject, *parts))

    async def ask(self, kind: Kind, payload: bytes, receive: Receive | None = None) -> Frame:
        """The frame that answers this one; `receive` tells of a client that hangs up.

        Raises NotReady when the engine process has ended, and ClientGone.
        """
        if self._transport.is_closing():
            raise NotReady("the engine process has ended")
        number, loop = next(self._numbers) % 2**32, asyncio.get_running_loop()
        waiter: asyncio.Future[Frame] = loop.create_future()
        self._waiting[number] = waiter
        self.send(kind, number, payload)
        watching: list[asyncio.Task[None]] = []
        timer = None if receive is None else loop.call_later(_WATCH_SECONDS, _watch, watching, receive, waiter)
        try:
            return await waiter
        except BaseException:  # the client hung up, or this process ends
            self.send(Kind.CANCEL, number)
            raise
        finally:
            del self._waiting[number]
            for handle in (*watching, timer):
                if handle is not None:
                    handle.cancel()


class RemoteService:
    """Answers requests for one version of a model: tokenises, and lets the engine process embed the ids."""

    def __init__(self, number: int, model: "RemoteModel", link: EngineLink, tally: Tally) -> None:
        self.model, self.metrics = model, ModelTally(tally, model.name, model.manifest.version)
        self._number, self._link = number, link
        self._texts = TextSide(model)
        self._standing = StandingRefusal()
        self._accepted = Accepted()

    async def embed(self, request: EmbedRequest, receive: Receive | None = None) -> Embedded:
        """See `EmbeddingService.embed`."""
        self._texts.check(request)
        arrival = time.perf_counter()
        with self._accepted:
            rows, _ = await self._texts.tokenise(request)
            submitted = time.perf_counter()
            num_tokens = sum(map(len, rows))
            _check_size(len(rows), max(num_tokens, len(rows) * self.model.manifest.dimension))
            frame = await self._link.ask(Kind.EMBED, encode_embed(self._number, arrival, rows), receive)
        engine_seconds, vectors = self._read(frame)
        wait_seconds = time.perf_counter() - submitted
        times = (submitted - arrival, wait_seconds - engine_seconds, engine_seconds)
        return self._texts.finish(request, Embedded(vectors, num_tokens, *times))

    def _read(self, frame: Frame) -> tuple[float, NDArray[np.float32]]:
        if frame.kind is Kind.FAILURE:
            failure, _ = decode_document(frame.payload, Failure)
            error = _error_of(failure)
            if failure.stands and isinstance(error, Overloaded):
                self._standing.hold(error, time.perf_counter())
            raise error
        self._standing.drop()
        return decode_vectors(frame.payload)

    def is_flooded(self) -> bool:
        """Whether a refusal stands."""
        return self._standing.get(time.perf_counter()) is not None

    def turn_away(self) -> Overloaded | None:
        """See `StandingRefusal`."""
        return self._standing.get(time.perf_counter())

    def is_healthy(self) -> bool:
        """That is for the engine process to say."""
        return True

    async def retire(self) -> None:
        """Return once every request it was given is answered, and say so to the engine process."""
        await self._accepted.wait()
        self._texts.close()
        self._link.send(Kind.RELEASED, self._number)


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model whose engine runs in the engine process."""

    name: str
    manifest: Manifest
    tokenizer: TextTokenizer
    runtime: str
    has_custom_kernels: bool


class RemoteWorker(Served[RemoteService]):
    """Serves what the engine process serves, by its latest table."""

    def __init__(self, settings: Settings, tally: Tally) -> None:
        super().__init__(settings)
        self.metrics: Tally = tally
        self._services: dict[int, RemoteService] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    async def learn(self, frame: Frame, link: EngineLink) -> None:
        """Take in a model, or serve by a table and say so. Raises StreamBroken."""
        if frame.kind is Kind.MODEL:
            model = await asyncio.to_thread(_open_model, frame.payload)
            self._services[frame.subject] = RemoteService(frame.subject, model, link, self.metrics)
            return
        self._apply(decode_document(frame.payload, Table)[0])
        link.send(Kind.APPLIED, frame.subject)

    def _apply(self, table: Table) -> None:
        numbers = {number for shares in table.models.values() for number, _ in shares}
        if not numbers <= self._services.keys():
            raise StreamBroken("a table of models that never came")
        self.models = {name: self._versions(name, shares) for name, shares in table.models.items()}
        self.default, self.phase = table.default, table.phase
        for number in self._services.keys() - numbers:
            task = asyncio.create_task(self._services.pop(number).retire())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _versions(self, name: str, shares: Sequence[tuple[int, float]]) -> ModelVersions[RemoteService]:
        services = [self._services[number] for number, _ in shares]
        versions = ModelVersions(name, services[0])
        for service in services[1:]:
            versions.add(service)
        versions.set_weights(
            {s.model.manifest.version: weight for s, (_, weight) in zip(services, shares, strict=True)}
        )
        return versions


def _open_model(payload: Payload) -> RemoteModel:
    """The model of a MODEL frame. Raises StreamBroken."""
    document, tokenizer = decode_document(payload, ModelDocument)
    try:
        opened = TextTokenizer.from_json(bytes(tokenizer).decode(), document.manifest.max_seq_length)
    except Exception:  # tokenizers raises bare Exception
        raise StreamBroken(f"{len(tokenizer)} bytes that are no tokenizer") from None
    return RemoteModel(document.name, document.manifest, opened, document.runtime, document.has_custom_kernels)


def _check_size(num_texts: int, num_values: int) -> None:
    """Raises RequestTooLarge for what does not fit a frame, there or back."""
    if frame_bytes(num_texts, num_values) > MAX_FRAME_BYTES:
        raise RequestTooLarge(f"{num_texts} texts with {num_values} ids or values do not fit {MAX_FRAME_BYTES} bytes")


def _error_of(failure: Failure) -> ServingError:
    """Raises StreamBroken for an error nobody knows."""
    kind = _ERRORS.get(failure.error)
    if kind is None:
        raise StreamBroken("a failure of no known kind")
    if kind is Overloaded:
        return Overloaded(failure.message, failure.retry_after_seconds or 1.0)
    return kind(failure.message, failure.param)


def _watch(watching: list["asyncio.Task[None]"], receive: Receive, waiter: "asyncio.Future[Frame]") -> None:
    """Fail `waiter` when the client hangs up."""
    watching.append(asyncio.get_running_loop().create_task(watch_client(receive, partial(_fail, waiter))))


def _fail(waiter: "asyncio.Future[Frame]", error: Exception) -> None:
    if not waiter.done():
        waiter.set_exception(error)
