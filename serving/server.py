"""The process around the application: socket, loading behind an open port, and the graceful drain."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from serving.api.embeddings import Observers
from serving.app import Application, create_app
from serving.connection import Connection
from serving.errors import ConfigInvalid, InternalError, ServingError
from serving.fronts import Fronts
from serving.request_log import open_request_log
from serving.settings import Settings
from serving.tls import TlsListener, open_certificate
from serving.tracing import open_tracer
from serving.worker import Worker

_BACKLOG = 2048
# The server's clock ticks ten times a second; slow clients are looked for on every fifth tick.
_TICKS_PER_PATROL = 5
_DRAIN_PATROL_SECONDS = 0.5

# Objects more than were freed before the collector looks at the newest, and rounds before it looks at older ones.
_GC_THRESHOLDS = (20_000, 20, 20)

_log = logging.getLogger(__name__)


def configure_logging(settings: Settings) -> None:
    """Lines of this process and its libraries on stderr."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


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


def settle_memory() -> None:
    """Keep the collector off what was loaded and lives as long as the process; requests leave few cycles behind.

    With torch in the process and 2,000 texts in flight its rounds took a fifth of the engine process's time.
    """
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


class HttpServer(uvicorn.Server):
    """Serves an application over HTTP or HTTPS, each client within limits of size and time."""

    def __init__(self, app: Application, settings: Settings, count_tls_reload: Callable[[str], None]) -> None:
        """Raises ConfigInvalid for a certificate that cannot be used."""
        self.settings = settings
        self._certificate = open_certificate(settings.tls, count_tls_reload, time.monotonic)
        protocol: Any = partial(Connection, limits=settings.limits, turn_away=app.turn_away)
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=max(1, int(settings.drain_seconds - settings.drain_grace_seconds)),
            )
        )

    async def listen(self, listener: socket.socket) -> None:
        """Accept connections."""
        self.servers.append(await self._open(listener))  # type: ignore[arg-type]  # it is closed and waited for

    async def _open(self, listener: socket.socket) -> asyncio.Server | TlsListener:
        state = {"server_state": self.server_state, "app_state": self.lifespan.state}
        protocol: Any = self.config.http_protocol_class
        connect = partial(protocol, config=self.config, **state)
        if self._certificate is None:
            return await asyncio.get_running_loop().create_server(connect, sock=listener, backlog=_BACKLOG)
        connections = self.server_state.connections
        return TlsListener(listener, self._certificate, connect, connections.__len__, self.settings.limits)

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

    async def finish(self, sockets: list[socket.socket] | None) -> None:
        """Accept no more, answer what was accepted, and wait for that."""
        patrol = asyncio.create_task(self._patrol_drain())  # the clock has stopped, slow clients have not
        await super().shutdown(sockets)
        patrol.cancel()
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)  # those it cancelled still answer
        _log.info("drained requests=%d", self.server_state.total_requests)


class WorkerServer(HttpServer):
    """Serves while the model still loads; on a signal turns unready, goes on for a grace time, drains and ends.

    With `http_processes` front processes speak HTTP in its place. `failure` is why the server ended on its own: the
    model did not load, or no front did.
    """

    def __init__(self, worker: Worker, on_ready: Callable[[], None] = lambda: None) -> None:
        settings = worker.settings
        self._log = open_request_log(settings.request_log, worker.metrics.count_logged)
        self._tracer = open_tracer(settings.tracing)
        app = create_app(worker, Observers(self._log, self._tracer))
        super().__init__(app, settings, worker.metrics.count_tls_reload)
        self.worker = worker
        self.failure: ServingError | None = None
        self._fronts = Fronts(worker, app, self._log) if settings.http_processes else None
        self._on_ready = on_ready
        self._loading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, then load the model."""
        assert sockets, "`bind` makes the socket"
        await super().startup([])
        for listener in sockets:
            if self._fronts is None:
                await self.listen(listener)
            else:
                self.worker.audience = self._fronts
                await self._fronts.start(listener)
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await self.worker.load()
            if self._fronts is not None:
                await self._fronts.announce()
                self._fronts.check_started()
        except ServingError as error:
            self.failure = error
        except Exception as error:  # the edge of start-up: a defect ends the process, it does not leave it unready
            _log.exception("the model cannot be loaded")
            self.failure = InternalError(f"the model cannot be loaded: {type(error).__name__}")
        if self.failure is not None:
            self.should_exit = True
            return
        settle_memory()
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Turn unready the moment the signal arrives; a second Ctrl-C ends at once."""
        self.worker.begin_drain()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer new requests for the grace time, then refuse them, wait for those accepted and free the engine."""
        self.worker.begin_drain()
        settings, is_quick = self.settings, self.failure is not None or self.force_exit
        if not is_quick:
            _log.info("draining grace_seconds=%g", settings.drain_grace_seconds)
            await asyncio.gather(self.worker.audience.announce(), asyncio.sleep(settings.drain_grace_seconds))
        self.worker.refuse()
        if self._fronts is not None:
            await self._fronts.drain(0 if self.force_exit else settings.drain_seconds - settings.drain_grace_seconds)
        await self.finish(sockets)
        if self._loading is not None:
            self._loading.cancel()
        self.worker.close()
        for observer in (self._log, self._tracer):
            if observer is not None:
                observer.close()

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
