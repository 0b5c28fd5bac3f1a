"""Every error, on every path, is the OpenAI error object with all four keys."""

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serving import errors
from serving.api.responses import describe_error, error_code, to_serving_error
from serving.errors import STATUS, InternalError, InvalidRequest, Overloaded, ServingError
from serving.settings import LimitsSettings

EMBED_PATHS = ["/api/v1/embed", "/v1/embeddings"]
GET_PATHS = ["/api/v1/models", "/api/v1/validate", "/v1/models", "/healthz", "/readyz", "/metrics", "/docs"]


def leaves(kind: type[ServingError]) -> Iterator[type[ServingError]]:
    if not kind.__subclasses__():
        yield kind
    for child in kind.__subclasses__():
        yield from leaves(child)


def check(answer: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document.keys() == {"error"}
    error = document["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert isinstance(error["message"], str)
    return dict(error)


def raw(url: str, payload: bytes) -> bytes:
    """What the worker answers to bytes that no HTTP client would send."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as connection:
        connection.sendall(payload)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_every_leaf_error_has_a_status_and_is_drawn_in_the_tree() -> None:
    kinds = set(leaves(ServingError))
    assert kinds == set(STATUS)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)
    assert all(400 <= status < 600 for status in STATUS.values())


def test_error_codes_are_snake_case() -> None:
    assert [error_code(kind) for kind in (InvalidRequest, Overloaded)] == ["invalid_request", "overloaded"]
    assert error_code(errors.InputTooLong) == "input_too_long"


def test_error_types_follow_openai() -> None:
    assert describe_error(Overloaded("full", 3))["error"]["type"] == "rate_limit_error"
    assert describe_error(InternalError("broken"))["error"]["type"] == "server_error"
    assert describe_error(InvalidRequest("bad", "text"))["error"]["param"] == "text"


def test_unexpected_exception_keeps_its_message_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("the client's own words")
    except ValueError as error:
        failed = to_serving_error(error)
    assert isinstance(failed, InternalError)
    assert "own words" not in str(failed) + caplog.text
    assert "ValueError" in caplog.text
    assert "test_errors.py:" in caplog.text


@pytest.mark.parametrize("path", EMBED_PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"text=hello",
        b'{"text": "a",}',
        b'{"text": NaN}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b'{"text": ' + b"[" * 100_000,
        b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"\x1f\x8b\x08\x00 not json",
    ],
)
def test_body_that_is_no_json_object_is_refused(url: str, path: str, body: bytes) -> None:
    check(httpx.post(url + path, content=body), 400, "invalid_request")


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/..%2f..%2fetc/passwd",
        "/docs/..%2fopenapi.py",
        "/v1/embeddings/",
        "/v1",
        "/api/v1/embed/x",
        "/%00",
        "/%F0%9F%99%82",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_path_is_not_found(url: str, path: str, method: str) -> None:
    check(httpx.request(method, url + path), 404, "route_not_found")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", EMBED_PATHS)
def test_other_methods_on_embed_paths_are_refused_with_allow(url: str, path: str, method: str) -> None:
    answer = httpx.request(method, url + path)
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("path", GET_PATHS)
def test_get_paths_answer_head_and_refuse_the_rest_with_allow(url: str, path: str) -> None:
    head, get = httpx.head(url + path), httpx.get(url + path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    answer = httpx.post(url + path)
    check(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_head_on_an_embed_path_has_no_body(url: str) -> None:
    answer = httpx.head(f"{url}/v1/embeddings")
    assert (answer.status_code, answer.content, answer.headers["allow"]) == (405, b"", "POST")


@pytest.mark.parametrize("path", EMBED_PATHS)
def test_body_over_the_limit_is_refused(url: str, path: str) -> None:
    limit = LimitsSettings().max_body_bytes
    declared = httpx.post(url + path, content=b"x" * (limit + 1))
    error = check(declared, 413, "body_too_large")
    assert f"limit {limit}" in str(error["message"])
    chunks = (b"x" * 65536 for _ in range(limit // 65536 + 1))
    check(httpx.post(url + path, content=chunks), 413, "body_too_large")


@pytest.mark.parametrize("path", EMBED_PATHS)
def test_compressed_body_is_refused_and_named(url: str, path: str) -> None:
    body = gzip.compress(b'{"text": "red", "input": "red", "model": "tiny", "inputs": "red"}')
    error = check(
        httpx.post(url + path, content=body, headers={"content-encoding": "gzip"}), 415, "unsupported_encoding"
    )
    assert "content-encoding" in str(error["message"])
    plain = {"content-encoding": "identity"}
    field = {"/api/v1/embed": {"text": "red"}, "/v1/embeddings": {"input": "red", "model": "tiny"}}[path]
    assert httpx.post(url + path, json=field, headers=plain).status_code == 200


def test_most_texts_of_full_length_fit_into_a_body(url: str) -> None:
    text = "The quick brown fox jumps over the lazy dog, then rests in the shade. " * 20
    assert len(text) == 1400  # about 256 tokens of English and more
    answer = httpx.post(f"{url}/api/v1/embed", json={"texts": [text] * 2048, "encoding_format": "base64"})
    assert answer.status_code == 200


def test_body_in_many_chunks_is_read_to_its_end(url: str) -> None:
    body = json.dumps({"text": "cat " * 100_000}).encode()
    chunks = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
    assert httpx.post(f"{url}/api/v1/embed", content=chunks).status_code == 200


@pytest.mark.parametrize(
    "payload", [b"no http at all\r\n\r\n", b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_bytes_that_are_no_http_get_an_error_object(url: str, payload: bytes) -> None:
    head, _, body = raw(url, payload).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    def request(text: str, connection: bytes = b"keep-alive") -> bytes:
        body = json.dumps({"text": text}).encode()
        head = b"POST /api/v1/embed HTTP/1.1\r\nhost: a\r\nconnection: %b\r\ncontent-length: %d\r\n\r\n"
        return head % (connection, len(body)) + body

    answer = raw(url, request("red") + request("red cat") + request("red cat dog", b"close"))
    bodies = [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert [json.loads(body)["usage"]["total_tokens"] for body in bodies] == [3, 4, 5]


def test_websocket_upgrade_is_answered_as_http(url: str) -> None:
    headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "a", "sec-websocket-version": "13"}
    assert httpx.get(f"{url}/healthz", headers=headers).status_code == 200


def test_limit_of_the_body_is_a_setting(bundle: Path) -> None:
    from serving.models import load_model
    from serving.settings import ModelSource
    from tests.serving.conftest import make_settings, serve

    settings = make_settings(bundle, limits={"max_body_bytes": 1024})
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        assert httpx.post(f"{url}/api/v1/embed", json={"text": "a" * 1000}).status_code == 200
        check(httpx.post(f"{url}/api/v1/embed", json={"text": "a" * 1024}), 413, "body_too_large")
