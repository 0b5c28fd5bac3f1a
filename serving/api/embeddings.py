"""The hot path: one ASGI endpoint for every dialect that turns texts into vectors."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import orjson
from starlette.types import Message, Receive, Scope, Send

from serving.api.requests import parse_native, parse_openai
from serving.api.responses import (
    CLOSE,
    error_code,
    render_vector,
    render_vectors,
    send_error,
    send_json,
    to_serving_error,
)
from serving.errors import STATUS, BodyTooLarge, ClientGone, NotReady
from serving.models import LoadedModel
from serving.service import Embedded, EmbeddingService, EmbedRequest
from serving.worker import Worker

Parse = Callable[[bytes, int], EmbedRequest]
# The answer's pieces; the last argument is when the request began, on `time.perf_counter`.
Render = Callable[[EmbedRequest, LoadedModel, Embedded, float], Awaitable[list[bytes]]]

_CLIENT_GONE_STATUS = 499


class EmbeddingsEndpoint:
    """A plain ASGI endpoint: body in, vectors out, nothing between that a request can do without."""

    def __init__(self, worker: Worker, parse: Parse, render: Render) -> None:
        self._worker, self._parse, self._render = worker, parse, render
        self._max_body_bytes = worker.settings.max_body_bytes
        self._max_texts = worker.settings.batching.max_texts_per_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        service: EmbeddingService | None = None
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
            request = self._parse(body, self._max_texts)
            service = self._worker.resolve(request.model, scope["headers"])
            embedded = await service.embed(request, receive)
            pieces = await self._render(request, service.model, embedded, started)
        except ClientGone:
            self._count_failure(service, _CLIENT_GONE_STATUS, error_code(ClientGone))
            return
        except asyncio.CancelledError:  # the drain ran out of time; uncaught, the server would answer in plain text
            await send_error(send, NotReady("the worker was stopped before the engine answered"), [CLOSE])
            return
        except Exception as error:  # the edge of a request: whatever happened, the client gets an error object
            failed = to_serving_error(error)
            self._count_failure(service, STATUS[type(failed)], error_code(type(failed)))
            await send_error(send, failed, [CLOSE] if self._worker.is_leaving else ())
            return
        service.metrics.count_answer(time.perf_counter() - started)
        await send_json(send, 200, pieces, [CLOSE] if self._worker.is_leaving else ())

    def _count_failure(self, service: EmbeddingService | None, status: int, code: str) -> None:
        if service is None:
            self._worker.metrics.count_refusal(status, code)
        else:
            service.metrics.count_failure(status, code)


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as that is known, ClientGone when the client hangs up."""
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


async def render_native(request: EmbedRequest, model: LoadedModel, embedded: Embedded, started: float) -> list[bytes]:
    """The answer of `POST /api/v1/embed`."""
    vectors = embedded.vectors
    if request.is_single:
        pieces = [b'{"embedding":', render_vector(vectors[0], request.as_base64)]
    else:
        pieces = [b'{"embeddings":[', *await render_vectors(vectors, request.as_base64, lambda _, row: row), b"]"]
    tail = {
        "model": model.name,
        "model_version": model.manifest.version,
        "dimension": vectors.shape[1],
        "latency_ms": round((time.perf_counter() - started) * 1000, 3),
        "usage": {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens},
    }
    return _join([*pieces, b"," + orjson.dumps(tail)[1:]])


async def render_openai(request: EmbedRequest, model: LoadedModel, embedded: Embedded, started: float) -> list[bytes]:
    """The answer of `POST /v1/embeddings`."""

    def wrap(index: int, row: bytes) -> bytes:
        return b'{"object":"embedding","index":%d,"embedding":%b}' % (index, row)

    if request.is_single:
        pieces = [wrap(0, render_vector(embedded.vectors[0], request.as_base64))]
    else:
        pieces = await render_vectors(embedded.vectors, request.as_base64, wrap)
    tail = {
        "model": model.name,
        "usage": {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens},
    }
    return _join([b'{"object":"list","data":[', *pieces, b"]," + orjson.dumps(tail)[1:]])


def _join(pieces: list[bytes]) -> list[bytes]:
    """A small answer leaves in one write; a large one is not copied again."""
    return [b"".join(pieces)] if len(pieces) < 8 else pieces


def native_endpoint(worker: Worker) -> EmbeddingsEndpoint:
    """`POST /api/v1/embed`."""
    return EmbeddingsEndpoint(worker, parse_native, render_native)


def openai_endpoint(worker: Worker) -> EmbeddingsEndpoint:
    """`POST /v1/embeddings`."""
    return EmbeddingsEndpoint(worker, parse_openai, render_openai)
