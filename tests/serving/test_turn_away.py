"""A flood is answered by its connections, unread, with the answer that the application gives."""

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest

from serving.access import KeyRing
from serving.admission import Admission, Backlog
from serving.errors import Overloaded
from serving.models import LoadedModel
from serving.server import WorkerServer
from serving.service import EmbeddingService
from tests.serving.conftest import keep_open, make_settings, serve, wait_until

NATIVE, OPENAI, TEI = "/api/v1/embed", "/v1/embeddings", "/embed"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def flooded(bundle: Path, model: LoadedModel, **changes: object) -> Iterator[tuple[str, WorkerServer]]:
    """A worker whose next requests are all refused for the wait."""
    with serve(make_settings(bundle, **changes), keep_open(model)) as (url, server):
        with pytest.raises(Overloaded):
            admission_of(server).check(Backlog(9, 99, is_full=False, due_tokens=99, seconds=60), now=math.inf)
        yield url, server


def admission_of(server: WorkerServer) -> Admission:
    service = server.worker.resolve(None)
    assert isinstance(service, EmbeddingService)
    return service._admission


@pytest.mark.parametrize("path", [NATIVE, OPENAI, TEI])
def test_request_turned_away_unread_gets_the_answer_that_the_application_gives(
    path: str, bundle: Path, model: LoadedModel
) -> None:
    with flooded(bundle, model) as (url, _):
        unread = httpx.post(url + path, content=b"not JSON")
        assert (unread.status_code, unread.headers["retry-after"]) == (429, "60")
        admitted = httpx.post(url + path, content=b"not JSON", headers={"traceparent": TRACE})
        assert admitted.status_code in (400, 422)  # a request to be traced is read
        assert unread.headers.keys() == {"date", "content-type", "content-length", "retry-after"}
        assert "9 texts with 99 tokens are waiting" in unread.text


def test_connection_goes_on_after_it_was_turned_away(bundle: Path, model: LoadedModel) -> None:
    with flooded(bundle, model) as (url, server), httpx.Client(base_url=url) as client:
        assert [client.post(NATIVE, json={"text": "red"}).status_code for _ in range(3)] == [429] * 3
        admission = admission_of(server)
        admission.standing.drop()
        admission._flooded_until = 0.0
        assert client.post(NATIVE, json={"text": "red"}).status_code == 200
        assert len(server.server_state.connections) == 1
        assert server.server_state.total_requests == 4


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/healthz", {}, 200),
        ("GET", NATIVE, {}, 405),
        ("POST", NATIVE, {"content-length": "100000"}, 400),
        ("POST", NATIVE, {"content-encoding": "gzip"}, 415),
    ],
)
def test_other_requests_are_looked_at_in_a_flood(
    method: str, path: str, headers: dict[str, str], status: int, bundle: Path, model: LoadedModel
) -> None:
    with flooded(bundle, model) as (url, _):
        content = b"x" * 100_000 if "content-length" in headers else b"x"
        answer = httpx.request(method, url + path, headers=headers, content=content if method == "POST" else None)
        assert answer.status_code == status


def test_key_is_asked_for_in_a_flood_too(bundle: Path, model: LoadedModel) -> None:
    with flooded(bundle, model, security={"api_keys": ["k" * 20]}) as (url, _):
        assert httpx.post(url + NATIVE, json={"text": "red"}).status_code == 401
        headers = {"authorization": "Bearer " + "k" * 20}
        assert httpx.post(url + NATIVE, json={"text": "red"}, headers=headers).status_code == 429


def test_key_is_asked_for_once_and_without_one_nobody_enters(
    bundle: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    accepts = KeyRing.accepts
    monkeypatch.setattr(KeyRing, "accepts", lambda ring, key: asked.append(key) or accepts(ring, key))
    known, unknown = ({"authorization": f"Bearer {letter * 20}"} for letter in "ku")
    with flooded(bundle, model, security={"api_keys": ["k" * 20]}) as (url, server):

        def post(headers: dict[str, str]) -> int:
            return httpx.post(url + NATIVE, json={"text": "red"}, headers=headers).status_code

        assert (post(known), len(asked)) == (429, 1)
        service = server.worker.resolve(None)
        looked: list[None] = []
        turn_away = service.turn_away
        monkeypatch.setattr(service, "turn_away", lambda: looked.append(None) or turn_away())
        assert [post(unknown), post({})] == [401, 401]
        assert looked == []
        admission = admission_of(server)
        admission.standing.drop()
        admission._flooded_until = 0.0
        asked.clear()
        assert (post(known), len(asked)) == (200, 1)
        assert (post(unknown), len(asked)) == (401, 2)


def test_request_in_pieces_is_answered_when_it_is_whole_and_before_a_drain_ends(
    bundle: Path, model: LoadedModel
) -> None:
    head = b"POST /api/v1/embed HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n"
    with flooded(bundle, model) as (url, server):
        where = (urlsplit(url).hostname, urlsplit(url).port)
        with socket.create_connection(where, timeout=10) as connection:
            connection.sendall(head + b"ab")
            wait_until(lambda: any(each._turned_away for each in server.server_state.connections))
            server.should_exit = True
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(10)
            connection.sendall(b"cd")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_body_that_does_not_come_is_given_up(bundle: Path, model: LoadedModel) -> None:
    head = b"POST /api/v1/embed HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n"
    with flooded(bundle, model, limits={"body_timeout_seconds": 0.3}) as (url, _):
        where = (urlsplit(url).hostname, urlsplit(url).port)
        with socket.create_connection(where, timeout=10) as connection:
            connection.sendall(head)
            assert b"".join(iter(lambda: connection.recv(65536), b"")).startswith(b"HTTP/1.1 408 ")


def test_pipelined_requests_are_turned_away_in_their_order(bundle: Path, model: LoadedModel) -> None:
    flood = b"POST /api/v1/embed HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx"
    health = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    with flooded(bundle, model) as (url, _):
        where = (urlsplit(url).hostname, urlsplit(url).port)
        with socket.create_connection(where, timeout=10) as connection:
            connection.sendall(flood + health + flood + last)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses[0] == 429
    assert statuses[1] == 200
    assert statuses[3] == 200
    assert statuses[2] in (400, 429)  # behind a request that is being answered it may have been let in


def test_those_let_through_count_as_waiting_until_they_are_in_the_queue(bundle: Path, model: LoadedModel) -> None:
    """In a flood the requests read at once are admitted one by one, although none is in the queue yet."""

    async def run() -> tuple[int, int]:
        settings = make_settings(bundle, batching={"latency_objective_ms": 1000})
        metrics = SimpleNamespace(watch_queue=lambda *_: None, count_engine_event=lambda *_: None)
        service = EmbeddingService(keep_open(model), settings, metrics)  # type: ignore[arg-type]
        service.start()
        service._admission._flooded_until = math.inf
        admitted = service._admission.max_wait_seconds
        service._runner.backlog = lambda is_bulk: Backlog(4, 40, False, 40, admitted - 0.05)  # type: ignore[method-assign,assignment]
        service._runner.predict = lambda tokens: 0.002 * tokens  # type: ignore[method-assign,assignment]
        first = [service.turn_away() for _ in range(8)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        service._admission.standing.drop()
        again = [service.turn_away() for _ in range(8)]
        service.close()
        return first.count(None), again.count(None)

    assert asyncio.run(run()) == (3, 3)  # each is worth 20 ms of the 50 that are left
