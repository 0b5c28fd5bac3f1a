"""The process around the application: socket, loading behind an open port, and the graceful drain."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.api.responses import describe_error
from serving.app import create_app
from serving.errors import ConfigInvalid, InternalError, InvalidRequest, ServingError
from serving.settings import Settings
from serving.worker import Worker

# Longer than clients keep idle connections, so that it is they who close them.
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 2048

_log = logging.getLogger(__name__)


class _Protocol(HttpToolsProtocol):
    """HTTP that cannot be parsed is answered with an error object, too."""

    def send_400_response(self, msg: str) -> None:
        """Answer and close the connection."""
        body = orjson.dumps(describe_error(InvalidRequest("the request is not HTTP/1.1")))
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


def bind(settings: Settings) -> socket.socket:
    """Listen on the configured address. Raises ConfigInvalid, which says what to do."""
    host, port = settings.host, settings.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        advice = "choose another --host"
        if error.errno == errno.EADDRINUSE:
            advice = "stop the process that has it or choose another --port (0 takes a free one)"
        elif error.errno == errno.EACCES:
            advice = "choose a --port above 1023"
        reason = (
            os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        )  # the resolver has its own
        raise ConfigInvalid(f"cannot listen on {host}:{port}: {reason}: {advice}") from None
    listener.setblocking(False)
    return listener


def base_url(listener: socket.socket) -> str:
    """`http://host:port` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class WorkerServer(uvicorn.Server):
    """Serves while the model still loads; on a signal turns unready, goes on for a grace time, drains and ends.

    `failure` is why the server ended on its own: the model did not load.
    """

    def __init__(self, worker: Worker, on_ready: Callable[[], None] = lambda: None) -> None:
        settings = worker.settings
        super().__init__(
            uvicorn.Config(
                create_app(worker),
                interface="asgi3",
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=max(1, int(settings.drain_seconds - settings.drain_grace_seconds)),
            )
        )
        self.worker = worker
        self.failure: ServingError | None = None
        self._on_ready = on_ready
        self._loading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, then load the model."""
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await self.worker.load()
        except ServingError as error:
            self.failure = error
        except Exception as error:  # the edge of start-up: a defect ends the process, it does not leave it unready
            _log.exception("the model cannot be loaded")
            self.failure = InternalError(f"the model cannot be loaded: {type(error).__name__}")
        if self.failure is not None:
            self.should_exit = True
            return
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Turn unready the moment the signal arrives; a second Ctrl-C ends at once."""
        self.worker.begin_drain()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer new requests for the grace time, then refuse them, wait for those accepted and free the engine."""
        self.worker.begin_drain()
        if self.failure is None and not self.force_exit:
            _log.info("draining grace_seconds=%g", self.worker.settings.drain_grace_seconds)
            await asyncio.sleep(self.worker.settings.drain_grace_seconds)
        self.worker.refuse()
        await super().shutdown(sockets)
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)  # those it cancelled still answer
        if self._loading is not None:
            self._loading.cancel()
        self.worker.close()
        _log.info("drained requests=%d", self.server_state.total_requests)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and Ctrl-C; unlike uvicorn's own, do not raise them again, so that a drain exits 0."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        handled = (signal.SIGTERM, signal.SIGINT)
        previous = {name: signal.signal(name, self.handle_exit) for name in handled}
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)
