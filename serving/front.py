"""`python -m serving.front LISTENER STREAM`: a process that speaks HTTP and tokenises for the engine process.

The engine process starts it with two open files: its share of the port, and the stream on which everything else comes,
settings first. It ends when it is told so or when the stream does; signals are the engine process's to act on.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from serving.access import ADMIN_PREFIX
from serving.api.admin import MAX_BODY_BYTES
from serving.api.embeddings import Observers, read_body
from serving.app import create_front_app
from serving.frames import (
    Answer,
    Call,
    Frame,
    FrameReader,
    Kind,
    Sample,
    StreamBroken,
    decode_document,
    encode_document,
    encode_vectors,
)
from serving.remote import EngineLink, RemoteWorker
from serving.request_log import Origin, Sampler
from serving.server import HttpServer, configure_logging, settle_memory
from serving.settings import Settings
from serving.tally import Tally
from serving.tracing import open_tracer

_log = logging.getLogger("serving.front")


class FrontServer(HttpServer):
    """Serves once it knows what is served; ends when the engine process says so, or when that is gone."""

    def __init__(self, settings: Settings, stream: socket.socket) -> None:
        self._stream, self._tally = stream, Tally()
        self._news: asyncio.Queue[Frame] = asyncio.Queue()
        self._link = EngineLink(self._news.put_nowait, self._leave)
        self._worker = RemoteWorker(settings, self._tally)
        self._tracer = open_tracer(settings.tracing)
        is_logged = settings.request_log.folder is not None
        log = RemoteLog(self._link, settings.request_log.sample_ratio) if is_logged else None
        app = create_front_app(self._worker, Observers(log, self._tracer), Forward(self._link, self._report))
        super().__init__(app, settings, self._tally.count_tls_reload)
        self._has_table = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port as soon as there is something to answer: until then its connections wait."""
        await super().startup([])
        await asyncio.get_running_loop().create_unix_connection(lambda: self._link, sock=self._stream)
        self._following = asyncio.create_task(self._follow())
        await self._has_table.wait()
        settle_memory()
        for listener in sockets or ():
            await self.listen(listener)

    async def _follow(self) -> None:
        """Act on models and tables in their order."""
        while True:
            frame = await self._news.get()
            try:
                await self._worker.learn(frame, self._link)
            except StreamBroken as error:
                self._link.break_off(error)
                return
            if frame.kind is Kind.TABLE:
                self._has_table.set()
                self.should_exit = self.should_exit or self._worker.phase == "closed"

    def _leave(self) -> None:
        """The stream has ended."""
        self.should_exit = True
        self._has_table.set()

    def _report(self) -> None:
        """Tell the engine process what was counted."""
        counts = self._tally.take()
        if counts is not None:
            self._link.send(Kind.COUNTS, 0, encode_document(counts))

    async def on_tick(self, counter: int) -> bool:
        """Report, too: ten times a second."""
        self._report()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted; the end of the stream says that it is done."""
        await self.finish(sockets)
        self._report()
        if self._following is not None:
            self._following.cancel()
        await self._link.close()
        if self._tracer is not None:
            self._tracer.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None are taken: whoever stops the worker may signal all its processes at once."""
        yield


class Forward:
    """Every request but those for vectors: the engine process's application answers it."""

    def __init__(self, link: EngineLink, report: Callable[[], None]) -> None:
        """`report` is called before, so that a scrape knows what this process has counted."""
        self._link, self._report = link, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ClientGone, BodyTooLarge, UnsupportedEncoding or NotReady."""
        is_admin = scope["path"].startswith(ADMIN_PREFIX)  # no other path takes a body
        body = await read_body(scope, receive, MAX_BODY_BYTES) if is_admin else b""
        self._report()
        call = Call(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]),
        )
        frame = await self._link.ask(Kind.CALL, encode_document(call, body))
        answer, data = decode_document(frame.payload, Answer)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(data)})


class RemoteLog:
    """The request log, which the engine process writes: its limits and its key are for all fronts together."""

    def __init__(self, link: EngineLink, ratio: float) -> None:
        self._link, self._sampler = link, Sampler(ratio)

    def offer(self, origin: Origin, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """See `RequestLog.offer`."""
        rows = self._sampler.pick(len(texts))
        if rows:
            sample = Sample(
                model=origin.model,
                model_version=origin.model_version,
                prompt=origin.prompt,
                texts=tuple(texts[row] for row in rows),
            )
            self._link.send(Kind.SAMPLE, 0, encode_document(sample, *encode_vectors(0.0, vectors[rows])))


def read_settings(stream: socket.socket) -> Settings | None:
    """The first frame; None when the engine process ended before it was sent. Raises StreamBroken."""
    reader, frames = FrameReader(), list[Frame]()
    while not frames:
        data = stream.recv(reader.num_missing, socket.MSG_WAITALL)
        if not data:
            return None
        frames = reader.feed(data)
    if frames[0].kind is not Kind.SETTINGS:
        raise StreamBroken(f"a frame of kind {frames[0].kind.name} before the settings")
    return Settings.model_validate_json(bytes(frames[0].payload))


def main(argv: Sequence[str]) -> int:
    """Serve until the engine process ends this. Returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    listener, stream = (socket.socket(fileno=int(file)) for file in argv)
    settings = read_settings(stream)
    if settings is not None:
        configure_logging(settings)
        for each in (listener, stream):
            each.setblocking(False)
        FrontServer(settings, stream).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
