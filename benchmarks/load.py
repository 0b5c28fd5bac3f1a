"""Load on an HTTP server: requests rendered beforehand go out over keep-alive connections, and every answer is timed.

Closed loop: each client sends its next request when the last was answered. Open loop: requests are due at times fixed
beforehand, whatever the server does, and a latency counts from the time the request was *due*: a server that stalls is
charged for every request that should have been sent meanwhile (no coordinated omission).

The generator shares the machine with what it measures, so it does little: no HTTP library, no parsing of bodies.
`LoadResult.cpu_seconds` says what it took itself.
"""

import asyncio
import math
import re
import selectors
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import numpy as np
import orjson
import uvloop
from numpy.typing import NDArray

# Statuses of requests that got no answer: the connection broke, or there was none to be had.
LOST, REFUSED = -1, -2
_BUFFER_BYTES = 1 << 18
_MAX_HEAD_BYTES = 1 << 16
_CONNECT_AT_ONCE = 64
# After the last request was sent, the time its answer may take.
_GRACE_SECONDS = 60.0
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after:[ \t]*\d+", re.IGNORECASE)

Times = NDArray[np.float64]
Clock = Callable[[], float]
# When the next request is due, in seconds since the start; None: no more.
Schedule = Callable[[float], float | None]
T = TypeVar("T")


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


def render_post(url: str, document: object, headers: Mapping[str, str] | None = None) -> bytes:
    """A `POST` of a JSON document, ready to be sent."""
    parts = urlsplit(url)
    body = orjson.dumps(document)
    fields = {"host": parts.netloc, "content-type": "application/json", "content-length": str(len(body))}
    lines = [
        f"POST {parts.path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in (fields | dict(headers or {})).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass(frozen=True, slots=True, eq=False)
class LoadResult:
    """One run: for each of N requests when it was due, sent and answered (seconds since the start) and its status."""

    due: Times
    sent: Times
    done: Times
    statuses: NDArray[np.int64]
    num_unguided: int
    """429 answers without a Retry-After."""
    seconds: float
    """Length of the run, in which new requests were sent."""
    cpu_seconds: float
    """Processor time the generator took."""

    def count(self, status: int) -> int:
        """Requests with this status."""
        return int((self.statuses == status).sum())

    @property
    def num_failed(self) -> int:
        """Requests that were neither answered (200) nor asked to come back later (429)."""
        return int((~np.isin(self.statuses, (200, 429))).sum())

    @property
    def requests_per_s(self) -> float:
        """Requests answered with 200 within the run, a second."""
        return float(((self.statuses == 200) & (self.done <= self.seconds)).sum() / self.seconds)

    def between(self, start: float, stop: float) -> "LoadResult":
        """The requests that were due from `start` until before `stop`, as a run of its own."""
        chosen = (self.due >= start) & (self.due < stop)
        times = {name: getattr(self, name)[chosen] - start for name in ("due", "sent", "done")}
        return replace(self, statuses=self.statuses[chosen], seconds=stop - start, **times)

    def latencies_ms(self, status: int = 200) -> Times:
        """From due to answered, of the requests with this status."""
        chosen = self.statuses == status
        latencies: Times = (self.done[chosen] - self.due[chosen]) * 1e3
        return latencies

    @property
    def lateness_ms(self) -> Times:
        """From due to sent: the generator's own delay, or its lack of connections."""
        lateness: Times = (self.sent - self.due) * 1e3
        return lateness


def join_results(parts: Sequence[LoadResult]) -> LoadResult:
    """Several runs as if they had followed one another without a pause."""
    starts = np.cumsum([0.0, *(part.seconds for part in parts)])
    times = {
        name: np.concatenate([getattr(part, name) + start for part, start in zip(parts, starts, strict=False)])
        for name in ("due", "sent", "done")
    }
    return LoadResult(
        **times,
        statuses=np.concatenate([part.statuses for part in parts]),
        num_unguided=sum(part.num_unguided for part in parts),
        seconds=float(starts[-1]),
        cpu_seconds=sum(part.cpu_seconds for part in parts),
    )


async def run_closed(
    target: Target,
    requests: Sequence[bytes],
    *,
    clients: int,
    seconds: float = math.inf,
    num_requests: int | None = None,
    clock: Clock = time.perf_counter,
) -> LoadResult:
    """`clients` connections send `requests`, over and over, for `seconds` or until `num_requests` were sent."""
    left = math.inf if num_requests is None else num_requests

    def next_due(now: float) -> float | None:
        nonlocal left
        if now >= seconds or left <= 0:
            return None
        left -= 1
        return now

    return await _Run(target, requests, clock).drive(next_due, clients, seconds)


async def run_open(
    target: Target,
    requests: Sequence[bytes],
    arrivals: Sequence[float],
    *,
    connections: int,
    clock: Clock = time.perf_counter,
) -> LoadResult:
    """Send one request at each of `arrivals` (seconds, ascending) over as many connections as are free then.

    When none is, the request goes out late, and its latency says so.
    """
    coming = iter(arrivals)
    return await _Run(target, requests, clock).drive(lambda _: next(coming, None), connections, float(arrivals[-1]))


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times below `seconds` of a Poisson process: independent users, `rate` requests a second on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(rate * seconds * 1.5) + 100)
    times = np.cumsum(gaps)
    return [float(time) for time in times[times < seconds]]


def constant_arrivals(rate: float, seconds: float) -> list[float]:
    """Arrival times below `seconds`, equally spaced."""
    return [index / rate for index in range(math.ceil(rate * seconds))]


def run_load(load: Coroutine[Any, Any, T], precise: bool = False) -> T:
    """Run a coroutine on a loop of its own: uvloop, which costs least.

    `precise`: a loop that wakes within 0.1 ms of a time asked for, where uvloop and epoll count whole milliseconds; for
    up to 1,000 connections.
    """
    factory = _make_precise_loop if precise else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(load)


def _make_precise_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class _Run:
    """What the clients of one run share: the requests, the clock and the record."""

    def __init__(self, target: Target, requests: Sequence[bytes], clock: Clock) -> None:
        self._target, self._requests, self._clock = target, requests, clock
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._started = 0.0
        self._num_sent = 0
        self._record: list[tuple[float, float, float, int]] = []
        self._num_unguided = 0

    async def drive(self, next_due: Schedule, clients: int, seconds: float) -> LoadResult:
        """Open the connections, then let each client follow the schedule until that ends."""
        connections: list[_Connection | None] = []
        while len(connections) < clients:  # by and by: a listen queue that overflows costs a second
            count = min(_CONNECT_AT_ONCE, clients - len(connections))
            connections += await asyncio.gather(*(self._connect() for _ in range(count)))
        cpu_started, self._started = time.process_time(), self._clock()
        tasks = [asyncio.create_task(self._follow(next_due, connection)) for connection in connections]
        timeout = None if math.isinf(seconds) else seconds + _GRACE_SECONDS
        _, late = await asyncio.wait(tasks, timeout=timeout)
        for task in late:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        cpu_seconds = time.process_time() - cpu_started
        for result in results:
            if isinstance(result, Exception):
                raise result
        return self._summarise(seconds, cpu_seconds)

    async def _follow(self, next_due: Schedule, connection: "_Connection | None") -> None:
        """One client: wait until a request is due, send it, wait for its answer. Ends when the server refuses it."""
        try:
            while (due := next_due(self._now())) is not None:
                while (wait := due - self._now()) > 0:
                    await asyncio.sleep(wait)
                if connection is None or not connection.is_usable:
                    connection = await self._connect()
                status = await self._exchange(connection, due)
                if status == REFUSED:
                    return
        finally:
            if connection is not None:
                connection.close()

    async def _exchange(self, connection: "_Connection | None", due: float) -> int:
        payload = self._requests[self._num_sent % len(self._requests)]
        self._num_sent += 1
        sent, status = self._now(), LOST
        try:
            status = REFUSED if connection is None else await connection.exchange(payload)
        finally:
            done = self._now() if connection is None or status == LOST else connection.done_at - self._started
            self._record.append((due, sent, done, status))
        if status == 429 and connection is not None and not connection.says_when:
            self._num_unguided += 1
        return status

    async def _connect(self) -> "_Connection | None":
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._buffer, self._clock), self._target.host, self._target.port
            )
        except OSError:
            return None
        return connection

    def _now(self) -> float:
        return self._clock() - self._started

    def _summarise(self, seconds: float, cpu_seconds: float) -> LoadResult:
        table = np.array(self._record, dtype=np.float64).reshape(-1, 4)
        if math.isinf(seconds):
            seconds = float(table[:, 2].max(initial=0.0))
        return LoadResult(
            due=table[:, 0],
            sent=table[:, 1],
            done=table[:, 2],
            statuses=table[:, 3].astype(np.int64),
            num_unguided=self._num_unguided,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )


class _Connection(asyncio.BufferedProtocol):
    """A keep-alive connection, one request at a time. Reads the head of an answer and counts the bytes of its body."""

    def __init__(self, buffer: memoryview, clock: Clock) -> None:
        """`buffer` may be shared: what was read into it is used before anything else is read."""
        self._buffer, self._clock = buffer, clock
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[int] | None = None
        self._head = b""
        self._missing = 0
        self._status = 0
        self.done_at = 0.0
        self.says_when = False
        self.is_usable = False

    async def exchange(self, payload: bytes) -> int:
        """Send a request; returns the status of its answer, or LOST. Raises UnreadableAnswer."""
        assert self._transport is not None
        self._answer = self._loop.create_future()
        self._transport.write(payload)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.is_usable = True

    def connection_lost(self, _: Exception | None) -> None:
        """The request under way, if any, is lost."""
        self.is_usable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(LOST)

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
            if not self._read_head(self._head[: end + 2]):
                return
            self._missing -= received
            self._head = b""
        if self._missing <= 0:
            self._finish()

    def _read_head(self, head: bytes) -> bool:
        length = _CONTENT_LENGTH.search(head)
        if length is None or not head.startswith(b"HTTP/1."):
            self._fail("the answer is not HTTP/1 with a content-length")
            return False
        self._status, self._missing = int(head[9:12]), int(length[1])
        self.says_when = self._status == 429 and _RETRY_AFTER.search(head) is not None
        if _CLOSE.search(head):
            self.is_usable = False
        return True

    def _finish(self) -> None:
        self.done_at = self._clock()
        if self._missing < 0 or self._answer is None or self._answer.done():
            self._fail("the server sent more than it was asked for")
            return
        self._answer.set_result(self._status)

    def _fail(self, reason: str) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(UnreadableAnswer(reason))
