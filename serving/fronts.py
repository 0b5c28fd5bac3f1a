"""The engine process's side of its front processes: started, told what is served, answered, and started again."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from asyncio import to_thread
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import ASGIApp

from serving.engines import num_cores
from serving.errors import ConfigInvalid, InternalError, NotReady
from serving.frames import Counts, Kind, ModelDocument, Table, encode_document, pack
from serving.front_link import FrontLink
from serving.request_log import RequestLog
from serving.service import EmbeddingService
from serving.settings import dump_settings
from serving.worker import Worker

_BACKLOG = 2048
_START_SECONDS = 60
# A front that does not take over a change within this is ended: what it would ask for will be gone.
_APPLY_SECONDS = 10
# One that dies sooner than this after its start is started again only after it.
_BACKOFF_SECONDS = 1.0
_END_SECONDS = 5

_log = logging.getLogger(__name__)


def share_port(listener: socket.socket, count: int) -> list[socket.socket]:
    """`count` sockets in the place of `listener`, among which the kernel shares new connections out evenly.

    With one socket for all processes, one of them would get nearly every connection of a burst. Raises ConfigInvalid.
    """
    host, port = listener.getsockname()[:2]
    listener.close()
    try:
        sockets = [
            socket.create_server((host, port), family=listener.family, backlog=_BACKLOG, reuse_port=True)
            for _ in range(count)
        ]
    except (OSError, ValueError) as error:  # ValueError: a system without such sockets
        raise ConfigInvalid(f"embedding.http_processes: {host}:{port} cannot be shared: {error}") from None
    for each in sockets:
        each.setblocking(False)
    return sockets


class Fronts:
    """Everything about all fronts. Lives on one event loop.

    A new front is told the latest table, an old one each that follows; a version is freed only when every front has
    said that it has sent its last request there.
    """

    def __init__(self, worker: Worker, app: ASGIApp, request_log: RequestLog | None) -> None:
        self.app, self.request_log = app, request_log
        self._worker = worker
        self._listeners: list[socket.socket] = []
        self._links: set[FrontLink] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._announcing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._is_closing = False
        self._services: dict[int, EmbeddingService] = {}
        self._numbers: dict[EmbeddingService, int] = {}
        self._models: dict[int, bytes] = {}  # MODEL frames
        self._next_number = 1
        self._serial = 0
        self._table = self._make_table()

    async def start(self, listener: socket.socket) -> None:
        """Start a front for each share of the port of `listener`."""
        self._listeners = share_port(listener, self._worker.settings.http_processes)
        for each in self._listeners:
            if not self._is_closing:
                await self._spawn(each)

    def check_started(self) -> None:
        """Raises InternalError unless every front serves."""
        num_wanted = len(self._listeners)
        num_serving = sum(link.applied == self._serial for link in self._links)
        if num_serving < num_wanted:
            raise InternalError(f"{num_serving} of {num_wanted} front processes serve: the log has why")

    def find(self, number: int) -> EmbeddingService:
        """The service of that number. Raises NotReady when it was given up without this front's word."""
        service = self._services.get(number)
        if service is None:
            raise NotReady("this version is served no longer: ask again")
        return service

    async def announce(self) -> None:
        """Tell every front what is served now; return when all of them send new requests by it."""
        async with self._announcing:
            while unknown := [service for service in self._worker.services if service not in self._numbers]:
                for service in unknown:
                    self._register(service, await to_thread(_describe, service))
            self._serial += 1
            serial, self._table = self._serial, self._make_table()
            for link in self._links:
                self._tell(link)
        has_started = all(link.applied for link in self._links)
        seconds = _APPLY_SECONDS if has_started else _START_SECONDS
        if not await self._until(lambda: all(link.applied >= serial for link in self._links), seconds):
            for link in [link for link in self._links if link.applied < serial]:
                _log.error("front process does not answer pid=%d: it is ended", link.process.pid)
                link.process.kill()

    async def released(self, service: EmbeddingService) -> None:
        """Return when no front has a request for `service` any more, or is too late with it."""
        number = self._numbers.get(service)
        if number is None:
            return
        seconds = self._worker.settings.request_timeout_seconds + _APPLY_SECONDS
        if not await self._until(lambda: not self._may_ask(number), seconds):
            _log.error("front processes keep asking for a version that goes model=%s", service.model.name)
        del self._numbers[service], self._services[number], self._models[number]

    def _may_ask(self, number: int) -> bool:
        return number in _numbers_in(self._table) or any(number in link.held for link in self._links)

    async def drain(self, seconds: float) -> None:
        """Have every front answer what it accepted and end, within that time."""
        self._is_closing = True
        for listener in self._listeners:
            listener.close()
        if seconds > 0:
            await self.announce()
            await self._until(lambda: not self._links, seconds + _END_SECONDS)
        for link in self._links:
            _log.error("front process does not end pid=%d: it is killed", link.process.pid)
            link.process.kill()
        await self._until(lambda: not self._links, _END_SECONDS)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_SECONDS)

    def count(self, counts: Counts) -> None:
        """Add what a front counted."""
        metrics = self._worker.metrics
        for model, version, seconds in counts.answers:
            metrics.count_answers(model, version, seconds)
        for model, version, status, error, number in counts.failures:
            metrics.count_failures(model, version, status, error, number)
        for outcome in counts.tls_reloads:
            metrics.count_tls_reload(outcome)

    def note(self) -> None:
        """A front has said how far it is."""
        self._changed.set()

    def lose(self, link: FrontLink) -> None:
        """A front has ended, or its stream."""
        self._links.discard(link)
        self._changed.set()
        self._do(self._replace(link))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, link: FrontLink) -> None:
        """Start another front in the place of one that has ended, with the connections that wait at its socket."""
        lived_seconds = asyncio.get_running_loop().time() - link.started_at
        status = await to_thread(_reap, link.process)
        if self._is_closing:
            return
        _log.error("front process ended pid=%d status=%d: another is started", link.process.pid, status)
        self._worker.metrics.count_front_restart("killed" if status < 0 else "ended")
        if lived_seconds < _BACKOFF_SECONDS:
            await asyncio.sleep(_BACKOFF_SECONDS)
        while not self._is_closing and not await self._try_to_spawn(link.listener):
            await asyncio.sleep(_BACKOFF_SECONDS)

    async def _try_to_spawn(self, listener: socket.socket) -> bool:
        try:
            await self._spawn(listener)
        except OSError as error:  # out of memory, processes or files
            _log.error("front process cannot be started reason=%s", error.strerror)
            return False
        return True

    async def _spawn(self, listener: socket.socket) -> None:
        """Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            link = FrontLink(self, _start(listener, theirs, len(self._listeners)), listener)
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        except BaseException:  # cancelled, too: without its stream a front ends by itself
            ours.close()
            raise
        finally:
            theirs.close()

    def greet(self, link: FrontLink) -> None:
        """Tell a front all that it has to know."""
        self._links.add(link)
        link.send(pack(Kind.SETTINGS, 0, dump_settings(self._worker.settings)))
        self._tell(link)

    def _tell(self, link: FrontLink) -> None:
        for number in _numbers_in(self._table):
            if number not in link.held:
                link.held.add(number)
                link.send(self._models[number])
        link.send(pack(Kind.TABLE, self._serial, encode_document(self._table)))

    def _register(self, service: EmbeddingService, description: bytes) -> None:
        number = self._next_number
        self._next_number += 1
        self._numbers[service], self._services[number] = number, service
        self._models[number] = pack(Kind.MODEL, number, description)

    def _make_table(self) -> Table:
        models = {
            name: tuple(
                (self._numbers[service], versions.weights[version]) for version, service in versions.services.items()
            )
            for name, versions in self._worker.models.items()
        }
        return Table(phase=self._worker.phase, default=self._worker.default, models=models)

    async def _until(self, is_so: Callable[[], bool], seconds: float) -> bool:
        """Whether that is so within this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not is_so():
                    self._changed.clear()
                    await self._changed.wait()
        return is_so()


def _numbers_in(table: Table) -> list[int]:
    return [number for shares in table.models.values() for number, _ in shares]


def _describe(service: EmbeddingService) -> bytes:
    """Payload of a MODEL frame."""
    model = service.model
    document = ModelDocument(
        name=model.name,
        manifest=model.manifest,
        runtime=model.runtime,
        has_custom_kernels=model.has_custom_kernels,
    )
    return encode_document(document, model.tokenizer.to_json().encode())


def _start(listener: socket.socket, stream: socket.socket, num_fronts: int) -> "subprocess.Popen[bytes]":
    """A front process. Raises OSError."""
    # The tokenizers of all fronts share the cores: each would start a thread for every core.
    environment = {"RAYON_NUM_THREADS": str(max(1, num_cores() // num_fronts))} | os.environ
    files = (listener.fileno(), stream.fileno())
    command = [sys.executable, "-m", "serving.front", *map(str, files)]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, pass_fds=files, env=environment)


def _reap(process: "subprocess.Popen[bytes]") -> int:
    """The exit status of a front whose stream has ended."""
    try:
        return process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
