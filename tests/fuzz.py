"""What no client should send: requests made from the worker's OpenAPI document, and spoilt bytes on its socket."""

import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings

# What schemathesis asks of each answer. Whether a model or a number of dimensions exists, a schema cannot say.
_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def run_schemathesis(url: str, cases_per_operation: int) -> int:
    """Send valid and invalid requests for every operation of the document at `url`; returns how many were sent."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checks = [check for check in CHECKS.get_all() if check.__name__ in _CHECKS]
    assert len(checks) == len(_CHECKS)
    sent = 0

    def send(case: Any) -> None:
        nonlocal sent
        sent += 1
        case.call_and_validate(checks=checks)

    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                _given(strategy, send, cases_per_operation // 2)()
            except Exception as error:
                if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
                    raise
    assert httpx.get(f"{url}/healthz").status_code == 200
    return sent


def _given(strategy: Any, send: Callable[[Any], None], count: int) -> Callable[[], None]:
    from hypothesis import given

    phases = (Phase.explicit, Phase.generate)
    bounds = settings(
        max_examples=count, deadline=None, phases=phases, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    test: Callable[[], None] = bounds(given(case=strategy)(send))
    return test


_BODY = b'{"texts": ["red cat", "\xf0\x9f\x99\x82"], "model": "tiny", "dimensions": 4}'
_WHOLE = (
    b"POST /api/v1/embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    % (len(_BODY), _BODY),
    b"POST /embed HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n11\r\n"
    b'{"inputs": "red"}\r\n0\r\na: b\r\n\r\n',
    b"GET /v1/models/%74iny?a=b HTTP/1.1\r\nhost: a\r\nconnection: keep-alive\r\n\r\nGET /readyz HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\nhello",
)
_PARTS = (
    b"\r\n", b"\r\n\r\n", b"\x00", b"\xff\xfe", b"HTTP/1.1", b"content-length: -1\r\n", b"content-length: 99999\r\n",
    b"transfer-encoding: chunked\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n", b"CONNECT a:1 HTTP/1.1\r\n",
    b"[" * 2000, b"ffffffffffffffff\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01",
    b"a" * 5000, b"%2e%2e%2f",
)  # fmt: skip


def spoil(seed: int) -> bytes:
    """One or two requests with some bytes flipped, dropped, repeated or put between."""
    draw = random.Random(seed)  # noqa: S311  nothing secret
    data = bytearray(b"".join(draw.choices(_WHOLE, k=draw.randint(1, 2))))
    for _ in range(draw.randint(0, 4)):
        place = draw.randrange(len(data) + 1)
        end = min(len(data), place + draw.randint(1, 12))
        change = draw.randrange(5)
        if change == 0:
            data[place:end] = draw.randbytes(end - place)
        elif change == 1:
            del data[place:end]
        elif change == 2:
            data[place:place] = draw.choice(_PARTS)
        elif change == 3:
            data[place:place] = data[place:end]
        else:
            del data[max(1, place) :]
    return bytes(data)


def send_bytes(url: str, payloads: list[bytes]) -> Iterator[bytes]:
    """Send each payload on a connection of its own, all at once, and yield all that comes back on each.

    Raises TimeoutError when the worker neither answers nor closes.
    """
    address = (urlsplit(url).hostname, urlsplit(url).port)
    connections = [socket.create_connection(address, timeout=20) for _ in payloads]
    for connection, payload in zip(connections, payloads, strict=True):
        with suppress(ConnectionError):
            connection.sendall(payload)
    for connection in connections:
        yield _read(connection)
        connection.close()


def _read(connection: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    """The statuses of the answers on one connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
