"""The clients of one load: keep-alive connections to which requests are dealt when they are due.

No task, future or timer of a request's own: what is due goes to the client that has been free the longest, and an
answer calls back. A request costs the generator about 30 µs.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import uvloop

# Statuses of requests that got no answer: the connection broke, or there was none to be had.
LOST, REFUSED = -1, -2
_BUFFER_BYTES = 1 << 18
_MAX_HEAD_BYTES = 1 << 16
_CONNECT_AT_ONCE = 64
# uvloop's timers count whole milliseconds: one of less than half of it fires at once, and the loop would spin.
_UVLOOP_TICK_SECONDS = 0.001
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)")
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close")
_RETRY_AFTER = re.compile(rb"\r\nretry-after:[ \t]*\d+")

Clock = Callable[[], float]
# When the next request is due, in seconds since the start; None: no more.
Schedule = Callable[[float], float | None]


class UnreadableAnswer(Exception):
    """The server answered with something this generator does not read."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Target":
        """The target of an `http://` URL. Raises ValueError for any other."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url!r} is no http:// URL")
        return cls(parts.hostname, parts.port or 80)


class Clients:
    """Sends the requests of a schedule, one at a time for each client, and keeps when each was due, sent and done."""

    def __init__(self, target: Target, requests: Sequence[bytes], next_due: Schedule, clock: Clock) -> None:
        """For the running loop."""
        self._loop = asyncio.get_running_loop()
        self._tick = _UVLOOP_TICK_SECONDS if isinstance(self._loop, uvloop.Loop) else 0.0
        self._target, self._requests, self._next_due, self._clock = target, requests, next_due, clock
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._idle: deque[Connection | None] = deque()  # None: a client that has yet to connect
        self._busy: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._due: float | None = None  # of the next request, taken from the schedule and not sent
        self._timer: asyncio.TimerHandle | None = None
        self._started = 0.0
        self._num_sent = 0
        self.record: list[tuple[float, float, float, int]] = []
        """Of each request that ended: due, sent, done (seconds since the start), status."""
        self.num_unguided = 0
        """429 answers without a Retry-After."""
        self.cpu_seconds = 0.0

    async def drive(self, count: int, timeout: float | None) -> None:
        """Open `count` connections and follow the schedule to its end; what has no answer by `timeout` s is lost.

        Raises UnreadableAnswer.
        """
        while len(self._idle) < count:  # by and by: a listen queue that overflows costs a second
            opening = min(_CONNECT_AT_ONCE, count - len(self._idle))
            self._idle += await asyncio.gather(*(self._connect() for _ in range(opening)))
        self._over = self._loop.create_future()
        cpu_started, self._started = time.process_time(), self._clock()
        try:
            self._deal()
            await asyncio.wait([self._over], timeout=timeout)
            if self._over.done():
                self._over.result()
        finally:
            self._end()
        self.cpu_seconds = time.process_time() - cpu_started

    def done(self, connection: "Connection", status: int, at: float, says_when: bool = False) -> None:
        """A connection's request has ended, at `at` on the clock; the connection is free."""
        self._busy.discard(connection)
        self.record.append((connection.due, connection.sent, at - self._started, status))
        if status == 429 and not says_when:
            self.num_unguided += 1
        self._idle.append(connection)
        if self._timer is None:
            self._deal()

    def fail(self, reason: str) -> None:
        """The run cannot go on."""
        if not self._over.done():
            self._over.set_exception(UnreadableAnswer(reason))

    def _deal(self) -> None:
        """Send what is due to those that are free; come back when the next request is due."""
        self._timer = None
        while self._idle:
            now = self._clock() - self._started
            if self._due is None:
                self._due = self._next_due(now)
                if self._due is None:
                    break
            if self._due > now:
                self._timer = self._loop.call_later(max(self._due - now, self._tick), self._deal)
                return
            self._send(self._idle.popleft(), self._due)
            self._due = None
        if not self._busy and not self._connecting and not self._over.done():
            self._over.set_result(None)

    def _send(self, connection: "Connection | None", due: float) -> None:
        payload = self._requests[self._num_sent % len(self._requests)]
        self._num_sent += 1
        if connection is None or not connection.is_usable:
            task = self._loop.create_task(self._connect_and_send(payload, due))
            self._connecting.add(task)
            return
        self._busy.add(connection)
        connection.send(payload, due, self._clock() - self._started)

    async def _connect_and_send(self, payload: bytes, due: float) -> None:
        """Send over a new connection; a client that gets none is out of the run."""
        connection = await self._connect()
        self._connecting.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        now = self._clock() - self._started
        if connection is None:
            self.record.append((due, now, now, REFUSED))
            self._deal()
        else:
            self._busy.add(connection)
            connection.send(payload, due, now)

    async def _connect(self) -> "Connection | None":
        try:
            _, connection = await self._loop.create_connection(
                lambda: Connection(self, self._buffer, self._clock), self._target.host, self._target.port
            )
        except OSError:
            return None
        return connection

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._over.done():
            self._over.cancel()
        now = self._clock() - self._started
        for task in self._connecting:
            task.cancel()
        for connection in self._busy:
            self.record.append((connection.due, connection.sent, now, LOST))
        for each in (*self._busy, *self._idle):
            if each is not None:
                each.close()


class Connection(asyncio.BufferedProtocol):
    """A keep-alive connection, one request at a time. Reads the head of an answer and counts the bytes of its body."""

    def __init__(self, clients: Clients, buffer: memoryview, clock: Clock) -> None:
        """`buffer` may be shared: what was read into it is used before anything else is read."""
        self._clients, self._buffer, self._clock = clients, buffer, clock
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._missing = self._status = 0
        self._says_when = self._is_waiting = False
        self.due = self.sent = 0.0
        self.is_usable = False

    def send(self, payload: bytes, due: float, now: float) -> None:
        """Send a request; `clients.done` is called when it has ended."""
        assert self._transport is not None
        self.due, self.sent, self._is_waiting = due, now, True
        self._transport.write(payload)

    def close(self) -> None:
        """Hang up; a request under way is nobody's any more."""
        self.is_usable = self._is_waiting = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.is_usable = True

    def connection_lost(self, _: Exception | None) -> None:
        """The request under way, if any, is lost."""
        self.is_usable = False
        if self._is_waiting:
            self._is_waiting = False
            self._clients.done(self, LOST, self._clock())

    def get_buffer(self, _: int) -> memoryview:
        """Where to read to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of an answer."""
        if self._missing:
            self._missing -= nbytes
        else:
            self._head += bytes(self._buffer[:nbytes])
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                if len(self._head) > _MAX_HEAD_BYTES:
                    self._fail(f"the head of the answer has more than {_MAX_HEAD_BYTES} bytes")
                return
            received = len(self._head) - end - 4
            if not self._read_head(self._head[: end + 2].lower()):
                return
            self._missing -= received
            self._head = b""
        if self._missing <= 0:
            self._finish()

    def _read_head(self, head: bytes) -> bool:
        length = _CONTENT_LENGTH.search(head)
        if length is None or not head.startswith(b"http/1."):
            self._fail("the answer is not HTTP/1 with a content-length")
            return False
        self._status, self._missing = int(head[9:12]), int(length[1])
        self._says_when = self._status == 429 and _RETRY_AFTER.search(head) is not None
        if _CLOSE.search(head):
            self.is_usable = False
        return True

    def _finish(self) -> None:
        if self._missing < 0 or not self._is_waiting:
            self._fail("the server sent more than it was asked for")
            return
        self._is_waiting = False
        self._clients.done(self, self._status, self._clock(), self._says_when)

    def _fail(self, reason: str) -> None:
        self.close()
        self._clients.fail(reason)
