"""Limits of size and time on a connection: every refusal is an error object, and nothing hangs."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serving.models import load_model
from serving.settings import ModelSource
from tests.bundles import make_bundle
from tests.fuzz import send_bytes, spoil, statuses
from tests.serving.conftest import make_settings, serve, wait_until, with_engine
from tests.serving.engines import HeldEngine

GET = b"GET /healthz HTTP/1.1\r\nhost: a\r\n"
POST = b"POST /api/v1/embed HTTP/1.1\r\nhost: a\r\n"
LIMITS = {
    "max_connections": 4,
    "max_header_bytes": 2048,
    "max_headers": 10,
    "header_timeout_seconds": 0.3,
    "body_timeout_seconds": 0.3,
    "answer_timeout_seconds": 0.3,
    "keep_alive_seconds": 1,
}


@pytest.fixture(scope="module")
def strict(bundle: Path) -> Iterator[str]:
    """A worker with short timeouts and few connections."""
    with serve(make_settings(bundle, limits=LIMITS), load_model(ModelSource(path=bundle))) as (address, _):
        yield address


def connect(url: str) -> socket.socket:
    connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def code_of(answer: bytes, status: int) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["code"])


@pytest.mark.parametrize(
    "head",
    [
        GET + b"a: " + b"x" * 2048 + b"\r\n\r\n",
        b"GET /" + b"x" * 2048 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        GET + b"a: b\r\n" * 10 + b"\r\n",
        GET + b"a: " + b"x" * 1_000_000,
        b"GET /" + b"x" * 1_000_000,
    ],
    ids=["long header", "long path", "many headers", "endless header", "endless path"],
)
def test_head_over_the_limit_is_refused(strict: str, head: bytes) -> None:
    with connect(strict) as connection:
        try:
            connection.sendall(head)
            assert code_of(read_to_end(connection), 431) == "headers_too_large"
        except ConnectionError:  # the worker closed while we were still sending
            assert len(head) > 100_000


def test_head_within_the_limit_is_answered(strict: str) -> None:
    assert httpx.get(f"{strict}/healthz", headers={"a": "x" * 1500}).status_code == 200


def test_head_that_does_not_arrive_in_time_is_refused(strict: str) -> None:
    with connect(strict) as silent, connect(strict) as begun, connect(strict) as empty:
        begun.sendall(GET)
        empty.sendall(b"\r\n")
        assert [code_of(read_to_end(each), 408) for each in (silent, begun, empty)] == ["request_too_slow"] * 3


def test_body_that_does_not_arrive_in_time_is_refused(strict: str) -> None:
    with connect(strict) as connection:
        connection.sendall(POST + b'content-length: 100\r\n\r\n{"text": ')
        answer = read_to_end(connection)
    assert code_of(answer, 408) == "request_too_slow"
    assert b"body did not arrive within 0.3 s" in answer


@pytest.mark.parametrize("tail", [b"no http at all\r\n\r\n", GET + b"a: " + b"x" * 3000 + b"\r\n\r\n"])
def test_refusal_of_a_later_request_is_not_taken_for_the_answer_of_an_earlier(
    strict: str, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"texts": ["red cat"] * 500}).encode()
    with connect(strict) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n%b" % (len(body), body) + tail)
        assert statuses(read_to_end(connection))[:1] in ([], [200])
    assert httpx.get(f"{strict}/healthz").status_code == 200
    assert "Exception" not in caplog.text


def test_rest_of_a_refused_body_does_not_hold_the_connection(strict: str) -> None:
    with connect(strict) as connection:
        connection.sendall(b"POST /nope HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n")
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_idle_connection_is_closed_without_an_answer(strict: str) -> None:
    with connect(strict) as connection:
        connection.sendall(GET + b"\r\n")
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_request_sent_in_single_bytes_is_answered(strict: str) -> None:
    body = b'{"text": "red"}'
    with connect(strict) as connection:
        for byte in POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body:
            connection.sendall(bytes((byte,)))
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("tail", [b"0\r\n" + b"a: b\r\n" * 500, b"1;" + b"x" * 3000], ids=["trailers", "extension"])
def test_framing_of_chunks_is_bounded(strict: str, tail: bytes) -> None:
    with connect(strict) as connection:
        connection.sendall(POST + b"expect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(tail)
        assert code_of(read_to_end(connection), 431) == "headers_too_large"


def test_trailers_are_no_headers(strict: str) -> None:
    body = b'{"text": "red"}'
    with connect(strict) as connection:
        head = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head + b"%x\r\n%b\r\n0\r\ntraceparent: x\r\n\r\n" % (len(body), body))
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_connection_over_the_limit_is_refused_and_welcome_once_others_left(strict: str) -> None:
    others = [connect(strict) for _ in range(4)]
    try:
        for other in others:
            other.sendall(GET + b"\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 200 ")
        with connect(strict) as extra:
            answer = read_to_end(extra)
        assert code_of(answer, 503) == "too_many_connections"
        assert b"4 connections are open" in answer
    finally:
        for other in others:
            read_to_end(other)  # the worker closes them when they have been idle long enough
            other.close()
    assert httpx.get(f"{strict}/healthz").status_code == 200


def test_client_that_does_not_read_its_answer_is_dropped(tmp_path: Path) -> None:
    make_bundle(tmp_path / "wide", dimension=1024)  # so that the answer is larger than the kernel's buffers
    body = json.dumps({"texts": ["red cat"] * 2048}).encode()
    settings = make_settings(tmp_path / "wide", limits=LIMITS)
    with serve(settings, load_model(ModelSource(path=tmp_path / "wide"))) as (url, server), connect(url) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        head = connection.recv(512)
        wait_until(lambda: not server.server_state.connections)
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        with suppress(ConnectionError):
            assert len(head) + len(read_to_end(connection)) < length


def test_body_that_the_worker_itself_keeps_waiting_is_not_too_slow(bundle: Path) -> None:
    loaded = load_model(ModelSource(path=bundle))
    engine = HeldEngine(loaded.engine)
    body = json.dumps({"text": "cat " * 50_000}).encode()
    with serve(make_settings(bundle, limits=LIMITS), with_engine(loaded, engine)) as (url, _), connect(url) as client:
        client.sendall(POST + b"content-length: 15\r\n\r\n" + b'{"text": "red"}')
        assert engine.entered.wait(10)
        client.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:150_000])
        for _ in range(3):  # each takes the time after which a body is too slow
            with connect(url) as clock:
                assert statuses(read_to_end(clock)) == [408]
        engine.gate.set()
        client.sendall(body[150_000:])
        assert statuses(read_to_end(client)) == [200, 200]


def test_deeply_nested_json_is_refused_on_every_path(strict: str) -> None:
    for path in ("/api/v1/embed", "/v1/embeddings", "/embed"):
        for depth in (100, 1000, 100_000):
            for body in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
                assert httpx.post(strict + path, content=body).status_code in (400, 422)


def test_text_over_the_limit_of_characters_is_refused(bundle: Path) -> None:
    settings = make_settings(bundle, limits={"max_text_chars": 10})
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        assert httpx.post(f"{url}/api/v1/embed", json={"text": "a" * 10}).status_code == 200
        refused = httpx.post(f"{url}/api/v1/embed", json={"texts": ["a", "a" * 11]})
    assert refused.json()["error"]["code"] == "input_too_long"
    assert refused.json()["error"]["message"] == "text 1 has 11 characters, limit 10"


def test_spoilt_bytes_are_answered_or_refused_and_leave_nothing_behind(bundle: Path) -> None:
    limits = LIMITS | {"max_connections": 100}
    seen: set[int] = set()
    with serve(make_settings(bundle, limits=limits), load_model(ModelSource(path=bundle))) as (url, server):
        for start in range(0, 300, 60):
            for answer in send_bytes(url, [spoil(seed) for seed in range(start, start + 60)]):
                seen.update(statuses(answer))
        assert httpx.post(f"{url}/api/v1/embed", json={"text": "red"}).status_code == 200
        while server.server_state.connections:  # the last one's close is still on its way
            pass
        assert not server.server_state.tasks
    assert {200, 400, 404, 408} <= seen
    assert not {500, 502, 503, 504} & seen
