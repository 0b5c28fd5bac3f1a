"""The engine process's end of the stream to one front process: takes its frames, answers its requests."""

import asyncio
import logging
import socket
import subprocess
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

from serving.api.responses import CLOSE, to_serving_error
from serving.errors import Overloaded, ServingError
from serving.frames import (
    Answer,
    Call,
    Counts,
    Embed,
    Failure,
    Frame,
    FrameReader,
    Kind,
    Payload,
    Sample,
    StreamBroken,
    decode_document,
    decode_embed,
    decode_vectors,
    encode_document,
    encode_vectors,
    pack,
)
from serving.request_log import Origin, RequestLog
from serving.service import EmbeddingService

_log = logging.getLogger(__name__)


class Desk(Protocol):
    """What a link needs of those who have it."""

    app: ASGIApp
    request_log: RequestLog | None

    def find(self, number: int) -> EmbeddingService:
        """The service of that number. Raises NotReady."""
        ...

    def count(self, counts: Counts) -> None:
        """Add what a front counted."""
        ...

    def note(self) -> None:
        """A front has said how far it is."""
        ...

    def greet(self, link: "FrontLink") -> None:
        """The stream is there."""
        ...

    def lose(self, link: "FrontLink") -> None:
        """The stream has ended."""
        ...


class FrontLink(asyncio.Protocol):
    """One front: its process, its share of the port, and what it knows. Lives on one event loop."""

    def __init__(self, desk: Desk, process: "subprocess.Popen[bytes]", listener: socket.socket) -> None:
        self.process, self.listener = process, listener
        self.started_at = asyncio.get_running_loop().time()
        self.held: set[int] = set()  # services that it may have requests for
        self.applied = 0  # the table it works by
        self._desk = desk
        self._reader = FrameReader()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._transport: Any = None
        self._handlers: dict[Kind, Callable[[int, Payload], None]] = {
            Kind.EMBED: lambda subject, payload: self._do(subject, self._embed(subject, decode_embed(payload))),
            Kind.CALL: lambda subject, payload: self._do(subject, self._call(subject, *decode_document(payload, Call))),
            Kind.CANCEL: self._cancel,
            Kind.APPLIED: self._note_applied,
            Kind.RELEASED: self._note_released,
            Kind.COUNTS: lambda _, payload: self._desk.count(decode_document(payload, Counts)[0]),
            Kind.SAMPLE: self._log,
        }

    def connection_made(self, transport: Any) -> None:
        """The stream is there."""
        self._transport = transport
        self._desk.greet(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for what it asked any more."""
        for task in self._tasks.values():
            task.cancel()
        self._desk.lose(self)

    def data_received(self, data: bytes) -> None:
        """Act on each frame; one that makes no sense ends the stream, by which the front ends, too."""
        try:
            for frame in self._reader.feed(data):
                self._act(frame)
        except StreamBroken as error:
            _log.error("the stream of a front process is closed pid=%d reason=%s", self.process.pid, error)
            self._transport.abort()

    def send(self, frame: bytes) -> None:
        """Send a frame, unless the stream has ended."""
        if not self._transport.is_closing():
            self._transport.write(frame)

    def _act(self, frame: Frame) -> None:
        handler = self._handlers.get(frame.kind)
        if handler is None:
            raise StreamBroken(f"a frame of kind {frame.kind.name} from a front")
        handler(frame.subject, frame.payload)

    def _do(self, subject: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[subject] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(subject, None))

    def _cancel(self, subject: int, _: Payload) -> None:
        task = self._tasks.get(subject)
        if task is not None:  # else it was answered meanwhile
            task.cancel()

    def _note_applied(self, subject: int, _: Payload) -> None:
        self.applied = subject
        self._desk.note()

    def _note_released(self, subject: int, _: Payload) -> None:
        self.held.discard(subject)
        self._desk.note()

    async def _embed(self, subject: int, request: Embed) -> None:
        service: EmbeddingService | None = None
        try:
            service = self._desk.find(request.service)
            embedded = await service.embed_rows(request.rows, request.arrival)
        except Exception as error:  # the edge of a request
            failure = _describe(to_serving_error(error), service)
            self.send(pack(Kind.FAILURE, subject, encode_document(failure)))
            return
        self.send(pack(Kind.VECTORS, subject, *encode_vectors(embedded.engine_seconds, embedded.vectors)))

    async def _call(self, subject: int, call: Call, body: Payload) -> None:
        """Let the application answer; how the client's connection goes on is the front's to say."""
        started: Message = {}
        pieces: list[bytes] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        async def send(message: Message) -> None:
            started.update(message)
            pieces.append(message.get("body", b""))

        await self._desk.app(_scope_of(call), receive, send)
        headers = tuple(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in started["headers"]
            if (name, value) != CLOSE
        )
        answer = Answer(status=started["status"], headers=headers)
        self.send(pack(Kind.ANSWER, subject, encode_document(answer, b"".join(pieces))))

    def _log(self, subject: int, payload: Payload) -> None:
        sample, behind = decode_document(payload, Sample)
        _, vectors = decode_vectors(behind)
        if self._desk.request_log is not None and len(vectors) == len(sample.texts):
            origin = Origin(sample.model, sample.model_version, sample.prompt)
            self._desk.request_log.keep(origin, sample.texts, vectors)


def _scope_of(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": call.method,
        "path": call.path,
        "root_path": "",
        "query_string": call.query.encode("latin-1"),
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in call.headers],
        "client": None,
        "server": None,
    }


def _describe(error: ServingError, service: EmbeddingService | None) -> Failure:
    has_more = isinstance(error, Overloaded)
    return Failure(
        error=type(error).__name__,
        message=str(error),
        param=error.param,
        retry_after_seconds=error.retry_after_seconds if isinstance(error, Overloaded) else None,
        stands=has_more and service is not None and service.standing_refusal() is not None,
    )
