"""The process around the application: socket, loading behind an open port, and the graceful drain."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from serving.api.embeddings import Observers
from serving.app import create_app
from serving.connection import Connection
from serving.errors import ConfigInvalid, InternalError, ServingError
from serving.request_log import open_request_log
from serving.settings import Settings
from serving.tls import TlsListener, open_certificate
from serving.tracing import open_tracer
from serving.worker import Worker

_BACKLOG = 2048
# The server's clock ticks ten times a second; slow clients are looked for on every fifth tick.
_TICKS_PER_PATROL = 5
_DRAIN_PATROL_SECONDS = 0.5

_log = logging.getLogger(__name__)


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


def base_url(listener: socket.socket, is_tls: bool = False) -> str:
    """`http://host:port` of a listening socket, `https://` with TLS."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class WorkerServer(uvicorn.Server):
    """Serves while the model still loads; on a signal turns unready, goes on for a grace time, drains and ends.

    `failure` is why the server ended on its own: the model did not load.
    """

    def __init__(self, worker: Worker, on_ready: Callable[[], None] = lambda: None) -> None:
        settings = worker.settings
        self._certificate = open_certificate(settings.tls, worker.metrics.count_tls_reload, time.monotonic)
        self._observers = Observers(
            request_log=open_request_log(settings.request_log, worker.metrics.count_logged),
            tracer=open_tracer(settings.tracing),
        )
        protocol: Any = partial(Connection, limits=settings.limits)
        super().__init__(
            uvicorn.Config(
                create_app(worker, self._observers),
                interface="asgi3",
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=settings.limits.keep_alive_seconds,
                timeout_graceful_shutdown=max(1, int(settings.drain_seconds - settings.drain_grace_seconds)),
            )
        )
        self.worker = worker
        self.failure: ServingError | None = None
        self._on_ready = on_ready
        self._loading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, then load the model."""
        assert sockets, "`bind` makes the socket"
        await super().startup([])
        for listener in sockets:
            self.servers.append(await self._listen(listener))  # type: ignore[arg-type]  # it is closed and waited for
        self._loading = asyncio.create_task(self._load())

    async def _listen(self, listener: socket.socket) -> asyncio.Server | TlsListener:
        state = {"server_state": self.server_state, "app_state": self.lifespan.state}
        protocol: Any = self.config.http_protocol_class
        connect = partial(protocol, config=self.config, **state)
        if self._certificate is None:
            return await asyncio.get_running_loop().create_server(connect, sock=listener, backlog=_BACKLOG)
        limits, connections = self.worker.settings.limits, self.server_state.connections
        return TlsListener(listener, self._certificate, connect, connections.__len__, limits)

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

    async def on_tick(self, counter: int) -> bool:
        """Close the connections of clients that are too slow; look for a new certificate."""
        if counter % _TICKS_PER_PATROL == 0:
            if self._certificate is not None:
                self._certificate.refresh()
            self._enforce_limits()
        return await super().on_tick(counter)

    def _enforce_limits(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.enforce(now)

    async def _patrol_drain(self) -> None:
        while True:
            await asyncio.sleep(_DRAIN_PATROL_SECONDS)
            self._enforce_limits()

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
        patrol = asyncio.create_task(self._patrol_drain())  # the clock has stopped, slow clients have not
        await super().shutdown(sockets)
        patrol.cancel()
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)  # those it cancelled still answer
        if self._loading is not None:
            self._loading.cancel()
        self.worker.close()
        for observer in (self._observers.request_log, self._observers.tracer):
            if observer is not None:
                observer.close()
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
