"""The hot path: one ASGI endpoint for every dialect that turns texts into vectors."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from serving.api import tei
from serving.api.requests import TextLimits, parse_native, parse_openai, parse_tei
from serving.api.responses import (
    CLOSE,
    ErrorStyle,
    error_code,
    openai_error,
    render_error,
    render_rest,
    render_vector,
    render_vectors,
    send_error,
    send_json,
    to_serving_error,
)
from serving.errors import BodyTooLarge, ClientGone, NotReady, Overloaded, UnsupportedEncoding
from serving.request_log import Origin, TextLog
from serving.served import Served
from serving.texts import Embedded, EmbedRequest, Service, TextModel
from serving.tracing import TRACEPARENT, RequestTrace, Tracer, find_traceparent, parse_traceparent
from serving.traffic import VERSION_HEADER

# Whether a request to a path, by its headers, may be answered at all.
IsWelcome = Callable[[str, Sequence[tuple[bytes, bytes]]], bool]
Parse = Callable[[bytes, TextLimits], EmbedRequest]
# The answer's pieces; the last argument is when the request began, on `time.perf_counter`.
Render = Callable[[EmbedRequest, TextModel, Embedded, float], Awaitable[list[bytes]]]

_CLIENT_GONE_STATUS = 499
# Headers that ask for more than to read a body of the length they say, and the digits of a length that is short.
_NOT_PLAIN = frozenset((TRACEPARENT, b"transfer-encoding", b"content-encoding", b"expect"))
_SHORT_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Observers:
    """Who hears of a request beside the metrics; both are off by default."""

    request_log: TextLog | None = None
    tracer: Tracer | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one API spells requests, answers and errors."""

    path: str
    parse: Parse
    render: Render
    style: ErrorStyle = openai_error


class EmbeddingsEndpoint:
    """A plain ASGI endpoint: body in, vectors out, nothing between that a request can do without."""

    def __init__(self, worker: Served[Any], dialect: Dialect, observers: Observers) -> None:
        self._worker, self._dialect, self._observers = worker, dialect, observers
        limits = worker.settings.limits
        self._max_body_bytes = limits.max_body_bytes
        self._refusal: Overloaded | None = None
        self._turned_away = (0, b"")  # with that refusal
        self._limits = TextLimits(worker.settings.batching.max_texts_per_request, limits.max_text_chars)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        service: Service | None = None
        headers, trace = self._begin_trace(scope)
        if self._worker.is_leaving:
            headers.append(CLOSE)
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
            request = self._dialect.parse(body, self._limits)
            service = self._worker.resolve(request.model, scope["headers"])
            embedded = await service.embed(request, receive)
            if trace is not None:
                trace.add_answer(request, service.model, embedded)
            pieces = await self._dialect.render(request, service.model, embedded, started)
        except ClientGone:
            self._count_failure(service, trace, _CLIENT_GONE_STATUS, error_code(ClientGone))
            return
        except asyncio.CancelledError:  # the drain ran out of time; uncaught, the server would answer in plain text
            stopped = NotReady("the worker was stopped before the engine answered")
            status = await send_error(send, stopped, [*headers, CLOSE], self._dialect.style)
            self._count_failure(service, trace, status, error_code(NotReady))
            return
        except Exception as error:  # the edge of a request: whatever happened, the client gets an error object
            failed = to_serving_error(error)
            status = await send_error(send, failed, headers, self._dialect.style)
            self._count_failure(service, trace, status, error_code(type(failed)))
            return
        seconds = time.perf_counter() - started
        service.metrics.count_answer(seconds)
        version = service.model.manifest.version.encode()
        headers += [_server_timing(embedded, seconds), (VERSION_HEADER, version)]
        await send_json(send, 200, pieces, headers)
        self._observe(request, service.model, embedded, trace)

    def turn_away(self, headers: Sequence[tuple[bytes, bytes]], is_welcome: IsWelcome) -> tuple[int, bytes] | None:
        """Status and rest of the answer to a request that is refused whatever its body says; None: look at it.

        Looked at is every request that has to be traced, or whose headers are not those of a short JSON body, or that
        is not welcome, which is asked in a flood alone: a request that is let in shows its key when it is answered.
        """
        service = self._worker.sole_service
        if service is None or self._observers.tracer is not None or not service.is_flooded():
            return None
        if not is_welcome(self._dialect.path, headers):  # neither told of the flood nor counted as entering
            return None
        refusal = service.turn_away()
        if refusal is None or not _is_plain(headers):
            return None
        if refusal is not self._refusal:
            status, fields, body = render_error(refusal, style=self._dialect.style)
            self._refusal, self._turned_away = refusal, (status, render_rest(fields, body))
        service.metrics.count_failure(self._turned_away[0], error_code(Overloaded))
        return self._turned_away

    def _begin_trace(self, scope: Scope) -> tuple[list[tuple[bytes, bytes]], RequestTrace | None]:
        """The span, and the answer's `traceparent`: the span's; without spans, the one that came."""
        value = find_traceparent(scope["headers"])
        parent = None if value is None else parse_traceparent(value)
        tracer = self._observers.tracer
        if tracer is not None:
            trace = tracer.begin(parent, self._dialect.path)
            return [(TRACEPARENT, trace.traceparent)], trace
        return ([] if value is None or parent is None else [(TRACEPARENT, value)]), None

    def _count_failure(self, service: Service | None, trace: RequestTrace | None, status: int, code: str) -> None:
        if service is None:
            self._worker.metrics.count_refusal(status, code)
        else:
            service.metrics.count_failure(status, code)
        if trace is not None:
            trace.end(status, code)

    def _observe(self, request: EmbedRequest, model: TextModel, embedded: Embedded, trace: RequestTrace | None) -> None:
        if trace is not None:
            trace.end(200)
        if self._observers.request_log is not None:
            origin = Origin(model.name, model.manifest.version, request.prompt)
            self._observers.request_log.offer(origin, request.texts, embedded.vectors)


def _is_plain(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether the body has a length, a short one, and nothing else is asked for."""
    is_short = False
    for name, value in headers:
        if name in _NOT_PLAIN:
            return False
        if name == b"content-length":
            is_short = len(value) <= _SHORT_DIGITS
    return is_short


def _server_timing(embedded: Embedded, seconds: float) -> tuple[bytes, bytes]:
    """https://www.w3.org/TR/server-timing/, in milliseconds; the total ends where the rendered answer is sent."""
    phases = (embedded.tokenize_seconds, embedded.queue_seconds, embedded.engine_seconds, seconds)
    value = b"tokenize;dur=%.3f, queue;dur=%.3f, engine;dur=%.3f, total;dur=%.3f" % tuple(
        1000 * phase for phase in phases
    )
    return b"server-timing", value


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises BodyTooLarge as soon as that is known, UnsupportedEncoding, or ClientGone when the client hangs up.
    """
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"identity", b""):
            raise UnsupportedEncoding("the body has a content-encoding: send it as it is, without the header")
    message = await receive()
    chunk: bytes = _chunk(message)
    if not message.get("more_body"):
        if len(chunk) > max_bytes:
            raise _too_large(len(chunk), max_bytes)
        return chunk
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > max_bytes:
            raise _too_large(int(value), max_bytes)
    chunks, size = [chunk], len(chunk)
    while message.get("more_body"):
        message = await receive()
        chunks.append(_chunk(message))
        size += len(chunks[-1])
        if size > max_bytes:
            raise _too_large(size, max_bytes)
    return b"".join(chunks)


def _chunk(message: Message) -> bytes:
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    return body


def _too_large(size: int, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size} bytes or more, limit {limit}")


async def render_native(request: EmbedRequest, model: TextModel, embedded: Embedded, started: float) -> list[bytes]:
    """The answer of `POST /api/v1/embed`."""
    vectors = embedded.vectors
    if request.is_single:
        pieces = [b'{"embedding":', render_vector(vectors[0], request.encoding)]
    else:
        pieces = [b'{"embeddings":[', *await render_vectors(vectors, request.encoding), b"]"]
    tail = {
        "model": model.name,
        "model_version": model.manifest.version,
        "dimension": vectors.shape[1],
        "latency_ms": round((time.perf_counter() - started) * 1000, 3),
        "usage": {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens},
    }
    return _join([*pieces, b"," + orjson.dumps(tail)[1:]])


async def render_openai(request: EmbedRequest, model: TextModel, embedded: Embedded, started: float) -> list[bytes]:
    """The answer of `POST /v1/embeddings`."""

    def wrap(index: int, row: bytes) -> bytes:
        return b'{"object":"embedding","index":%d,"embedding":%b}' % (index, row)

    if request.is_single:
        pieces = [wrap(0, render_vector(embedded.vectors[0], request.encoding))]
    else:
        pieces = await render_vectors(embedded.vectors, request.encoding, wrap)
    tail = {
        "model": model.name,
        "usage": {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens},
    }
    return _join([b'{"object":"list","data":[', *pieces, b"]," + orjson.dumps(tail)[1:]])


def _join(pieces: list[bytes]) -> list[bytes]:
    """A small answer leaves in one write; a large one is not copied again."""
    return [b"".join(pieces)] if len(pieces) < 8 else pieces


DIALECTS = (
    Dialect("/api/v1/embed", parse_native, render_native),
    Dialect("/v1/embeddings", parse_openai, render_openai),
    Dialect(tei.EMBED_PATH, parse_tei, tei.render_tei, tei.tei_error),
)
