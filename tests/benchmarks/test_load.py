"""The load generator against a small server with known delays, in virtual time: every latency is exact."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.clients import LOST, REFUSED, Target, UnreadableAnswer
from benchmarks.load import (
    LoadResult,
    constant_arrivals,
    poisson_arrivals,
    render_post,
    run_closed,
    run_load,
    run_open,
)
from tests.benchmarks.virtual_time import run_virtual
from tests.servers import free_port

REQUEST = render_post("http://127.0.0.1:1/v1/embeddings", {"input": "hello"})
Answer = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


def reply(status: int = 200, body: bytes = b"{}", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class SmallServer:
    """Answers the k-th request it gets with `answer(k, writer)`; notes bodies and connections."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.bodies: list[bytes] = []
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                assert length is not None
                self.bodies.append(await reader.readexactly(int(length[1])))
                await self._answer(len(self.bodies) - 1, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def running(server: SmallServer) -> AsyncIterator[Target]:
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listener:
        yield Target("127.0.0.1", listener.sockets[0].getsockname()[1])
        listener.close()


def after(seconds: Sequence[float], data: bytes = reply()) -> Answer:
    """Answer the k-th request after `seconds[k % n]`."""

    async def answer(index: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds[index % len(seconds)])
        writer.write(data)

    return answer


def closed(server: SmallServer, requests: Sequence[bytes] = (REQUEST,), **options: float) -> LoadResult:
    async def run() -> LoadResult:
        async with running(server) as target:
            clock = asyncio.get_running_loop().time
            return await run_closed(target, requests, clock=clock, **options)  # type: ignore[arg-type]

    return run_virtual(run())


def opened(server: SmallServer, arrivals: Sequence[float], connections: int) -> LoadResult:
    async def run() -> LoadResult:
        async with running(server) as target:
            clock = asyncio.get_running_loop().time
            return await run_open(target, [REQUEST], arrivals, connections=connections, clock=clock)

    return run_virtual(run())


def test_closed_loop_sends_the_next_request_when_the_last_is_answered() -> None:
    server = SmallServer(after([0.25]))
    result = closed(server, clients=3, seconds=1.0)
    assert server.num_connections == 3
    assert len(result.statuses) == len(server.bodies) == 12
    assert result.requests_per_s == pytest.approx(12)
    assert result.latencies_ms() == pytest.approx(np.full(12, 250))
    assert sorted(result.sent.round(3)) == sorted([0, 0.25, 0.5, 0.75] * 3)
    assert result.cpu_seconds > 0


def test_answers_after_the_end_count_as_latency_but_not_as_throughput() -> None:
    result = closed(SmallServer(after([0.4])), clients=1, seconds=1.0)
    assert result.latencies_ms() == pytest.approx([400, 400, 400])
    assert result.requests_per_s == pytest.approx(2)


def test_closed_loop_stops_at_the_number_of_requests() -> None:
    server = SmallServer(after([0.1]))
    result = closed(server, clients=4, num_requests=10)
    assert len(server.bodies) == len(result.due) == 10
    assert result.seconds == pytest.approx(0.3)


def test_requests_take_turns() -> None:
    payloads = [render_post("http://127.0.0.1/x", {"input": str(index)}) for index in range(3)]
    server = SmallServer(after([0.1]))
    closed(server, payloads, clients=1, num_requests=7)
    assert server.bodies == [b'{"input":"%d"}' % (index % 3) for index in range(7)]


def test_open_loop_sends_on_time_whatever_the_server_does() -> None:
    result = opened(SmallServer(after([0.5, 0.1])), [0.0, 0.1, 0.2, 0.3], connections=4)
    assert sorted(result.sent) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert sorted(result.latencies_ms()) == pytest.approx([100, 100, 500, 500])
    assert result.lateness_ms == pytest.approx(np.zeros(4))


def test_open_loop_charges_a_stall_to_every_request_that_was_due_meanwhile() -> None:
    result = opened(SmallServer(after([1.0, 0.0, 0.0, 0.0])), [0.0, 0.2, 0.4, 0.6], connections=1)
    assert result.latencies_ms() == pytest.approx([1000, 800, 600, 400])
    assert result.lateness_ms == pytest.approx([0, 800, 600, 400])


def test_statuses_are_counted_and_only_answers_are_timed() -> None:
    async def answer(index: int, writer: asyncio.StreamWriter) -> None:
        data = [reply(), reply(429, b"busy", "Retry-After: 2"), reply(429), reply(500)][index]
        await asyncio.sleep(0.1 * (index + 1))
        writer.write(data)

    result = closed(SmallServer(answer), clients=1, num_requests=4)
    assert [result.count(status) for status in (200, 429, 500)] == [1, 2, 1]
    assert result.num_failed == 1
    assert result.num_unguided == 1
    assert result.latencies_ms() == pytest.approx([100])
    assert result.latencies_ms(429) == pytest.approx([200, 300])


def test_answer_in_pieces_is_one_answer() -> None:
    async def answer(_: int, writer: asyncio.StreamWriter) -> None:
        data = reply(200, b"x" * 300_000)
        for start, stop in ((0, 5), (5, 60), (60, 100_000), (100_000, len(data))):
            writer.write(data[start:stop])
            await asyncio.sleep(0.1)

    result = closed(SmallServer(answer), clients=1, num_requests=2)
    assert result.count(200) == 2
    assert result.latencies_ms()[0] == pytest.approx(300)


def test_connection_that_the_server_closes_is_opened_again() -> None:
    async def answer(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(200, b"{}", "Connection: close"))
        writer.close()

    server = SmallServer(answer)
    result = closed(server, clients=1, num_requests=3)
    assert result.count(200) == server.num_connections == 3


def test_connection_that_breaks_before_the_answer_is_a_lost_request() -> None:
    async def answer(index: int, writer: asyncio.StreamWriter) -> None:
        if index == 1:
            writer.close()
        else:
            writer.write(reply())

    result = closed(SmallServer(answer), clients=1, num_requests=3)
    assert list(result.statuses) == [200, LOST, 200]
    assert result.num_failed == 1


def test_server_that_is_gone_ends_the_clients() -> None:
    result = run_load(run_closed(Target("127.0.0.1", free_port()), [REQUEST], clients=3, seconds=60.0))
    assert list(result.statuses) == [REFUSED] * 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", "content-length"),
        (b"SSH-2.0-x\r\ncontent-length: 0\r\n\r\n", "HTTP/1"),
        (reply() + b"more", "more than it was asked for"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 11_000, "bytes"),
    ],
)
def test_answer_that_cannot_be_read_ends_the_run(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableAnswer, match=reason):
        closed(SmallServer(after([0.0], data)), clients=1, num_requests=1)


def test_answer_that_never_comes_is_lost() -> None:
    result = closed(SmallServer(after([1e6])), clients=2, seconds=1.0)
    assert list(result.statuses) == [LOST, LOST]
    assert min(result.done) >= 60


@pytest.mark.parametrize("precise", [True, False])
def test_both_event_loops_carry_the_load(precise: bool) -> None:
    server = SmallServer(after([0.0]))

    async def run() -> LoadResult:
        async with running(server) as target:
            return await run_closed(target, [REQUEST], clients=4, num_requests=40)

    assert run_load(run(), precise).count(200) == 40


def test_target_is_an_http_address() -> None:
    assert Target.of("http://127.0.0.1:8000/v1/embeddings") == Target("127.0.0.1", 8000)
    with pytest.raises(ValueError, match="no http"):
        Target.of("https://example.org")


def test_request_is_http_with_the_headers_asked_for() -> None:
    head, _, body = render_post("http://h:1/p", {"input": "é"}, {"authorization": "Bearer x"}).partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /p HTTP/1.1"
    assert {b"host: h:1", b"authorization: Bearer x", b"content-length: %d" % len(body)} <= set(head.split(b"\r\n"))
    assert body == '{"input":"é"}'.encode()


@given(rate=st.floats(1, 2000), seconds=st.floats(0.01, 5))
def test_constant_arrivals_are_equally_spaced_below_the_end(rate: float, seconds: float) -> None:
    arrivals = constant_arrivals(rate, seconds)
    assert arrivals[0] == 0
    assert len(arrivals) == pytest.approx(rate * seconds, abs=1)
    assert np.diff(arrivals) == pytest.approx(np.full(len(arrivals) - 1, 1 / rate))


@given(seed=st.integers(0, 1000))
def test_poisson_arrivals_have_the_rate_and_the_spread_of_independent_users(seed: int) -> None:
    arrivals = np.array(poisson_arrivals(1000, 10, seed))
    gaps = np.diff(arrivals)
    assert (gaps >= 0).all()
    assert arrivals[-1] < 10
    assert len(arrivals) == pytest.approx(10_000, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)
    assert list(arrivals) == poisson_arrivals(1000, 10, seed)
