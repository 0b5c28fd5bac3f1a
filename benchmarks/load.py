"""Load on an HTTP server: requests rendered beforehand go out over keep-alive connections, and every answer is timed.

Closed loop: each client sends its next request when the last was answered. Open loop: requests are due at times fixed
beforehand, whatever the server does, and a latency counts from the time the request was *due*: a server that stalls is
charged for every request that should have been sent meanwhile (no coordinated omission).

The generator shares the machine with what it measures, so it does little: no HTTP library, no parsing of bodies.
`LoadResult.cpu_seconds` says what it took itself.
"""

import asyncio
import math
import selectors
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import orjson
import uvloop
from numpy.typing import NDArray

from benchmarks.clients import Clients, Clock, Target

# After the last request was sent, the time its answer may take.
_GRACE_SECONDS = 60.0

Times = NDArray[np.float64]
T = TypeVar("T")


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

    return await _run(Clients(target, requests, next_due, clock), clients, seconds)


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
    clients = Clients(target, requests, lambda _: next(coming, None), clock)
    return await _run(clients, connections, float(arrivals[-1]))


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


async def _run(clients: Clients, count: int, seconds: float) -> LoadResult:
    await clients.drive(count, None if math.isinf(seconds) else seconds + _GRACE_SECONDS)
    table = np.array(clients.record, dtype=np.float64).reshape(-1, 4)
    if math.isinf(seconds):
        seconds = float(table[:, 2].max(initial=0.0))
    return LoadResult(
        due=table[:, 0],
        sent=table[:, 1],
        done=table[:, 2],
        statuses=table[:, 3].astype(np.int64),
        num_unguided=clients.num_unguided,
        seconds=seconds,
        cpu_seconds=clients.cpu_seconds,
    )
