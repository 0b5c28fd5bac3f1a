"""The engine process's end of a stream whose other end says anything at all."""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from serving.errors import NotReady
from serving.frames import (
    Call,
    Counts,
    Failure,
    FrameReader,
    Kind,
    decode_document,
    encode_document,
    encode_embed,
    pack,
)
from serving.front_link import FrontLink
from serving.service import EmbeddingService

WAIT = 30
ROW = np.array([2, 6, 3])


class QuietDesk:
    """Serves nothing and remembers what it was told."""

    request_log = None

    def __init__(self) -> None:
        self.counts: list[Counts] = []
        self.lost = asyncio.Event()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        head = [(b"connection", b"close"), (b"x-query", scope["query_string"])]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": scope["path"].encode() + body})

    def find(self, number: int) -> EmbeddingService:
        raise NotReady(f"no service {number}")

    def count(self, counts: Counts) -> None:
        self.counts.append(counts)

    def note(self) -> None:
        pass

    def greet(self, link: FrontLink) -> None:
        pass

    def lose(self, link: FrontLink) -> None:
        self.lost.set()


def talk(body: Callable[[QuietDesk, FrontLink, socket.socket], Awaitable[None]]) -> QuietDesk:
    """Run `body` with the other end of a link."""

    async def main() -> QuietDesk:
        desk = QuietDesk()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        with theirs, subprocess.Popen(["true"]) as process:
            link = FrontLink(desk, process, theirs)
            transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
            await asyncio.wait_for(body(desk, link, theirs), WAIT)
            transport.close()
            await asyncio.wait_for(desk.lost.wait(), WAIT)
        return desk

    return asyncio.run(main())


async def write(stream: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(stream, data)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        pack(Kind.VECTORS, 1, bytes(16)),  # what only the engine process says
        pack(Kind.EMBED, 1, bytes(3)),
        pack(Kind.COUNTS, 0, b"\x02\0\0\0[]"),
        pack(Kind.CALL, 1, b"\xff\xff\xff\xff{}"),
        pack(Kind.SAMPLE, 1),
        b"\xff\xff\xff\xff\x07\0\0\0\0",
    ],
)
def test_nonsense_closes_the_stream(data: bytes) -> None:
    async def body(desk: QuietDesk, link: FrontLink, stream: socket.socket) -> None:
        await write(stream, data)
        await desk.lost.wait()

    talk(body)


KINDS = (Kind.EMBED, Kind.CALL, Kind.CANCEL, Kind.APPLIED, Kind.RELEASED, Kind.COUNTS, Kind.SAMPLE, Kind.TABLE)


@bounds(max_examples=40)
@given(data=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.binary(max_size=40)), max_size=6))
def test_any_frames_leave_the_process_as_it_is(data: list[tuple[Kind, int, bytes]]) -> None:
    async def body(desk: QuietDesk, link: FrontLink, stream: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was closed already
            for frame in data:
                await write(stream, pack(*frame))

    talk(body)


def test_requests_are_answered_and_cancelled_by_their_number() -> None:
    async def body(desk: QuietDesk, link: FrontLink, stream: socket.socket) -> None:
        call = Call(method="GET", path="/p", query="a=é", headers=(("x", "é"),))
        await write(stream, pack(Kind.CALL, 7, encode_document(call, b"body")))
        await write(stream, pack(Kind.CANCEL, 99) + pack(Kind.EMBED, 8, encode_embed(3, 1.0, [ROW])))
        await write(stream, pack(Kind.COUNTS, 0, encode_document(Counts(answers=(), failures=(), tls_reloads=()))))
        await write(stream, pack(Kind.APPLIED, 5) + pack(Kind.RELEASED, 3))
        reader, frames = FrameReader(), []
        while len(frames) < 2:
            frames += reader.feed(await asyncio.get_running_loop().sock_recv(stream, 65_536))
        answers = {frame.subject: frame for frame in frames}
        failure, _ = decode_document(answers[8].payload, Failure)
        assert (failure.error, failure.message) == ("NotReady", "no service 3")
        assert bytes(answers[7].payload).endswith(b"/pbody")
        assert b"close" not in bytes(answers[7].payload)
        assert link.applied == 5

    assert len(talk(body).counts) == 1
