"""Response bodies and the one way errors leave: the OpenAI error object with all four keys, on every path."""

import asyncio
import logging
import re
import traceback
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.types import Send

from serving.errors import (
    STATUS,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    RouteNotFound,
    ServingError,
)
from serving.texts import Encoding

Vectors = NDArray[np.float32]
Headers = Sequence[tuple[bytes, bytes]]
# The status and the JSON object a dialect answers an error with.
ErrorStyle = Callable[[ServingError], tuple[int, dict[str, Any]]]

JSON_TYPE = (b"content-type", b"application/json")
CLOSE = (b"connection", b"close")
# Rendering this many values takes about 0.5 ms; between such slices the loop serves others.
_SLICE_VALUES = 25_000

_log = logging.getLogger(__name__)


def render_vector(vector: Vectors, encoding: Encoding) -> bytes:
    """One vector as JSON: a list of numbers, or a string of base64 of what `pack_vector` makes of it."""
    if encoding == "float":
        return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)
    return b'"%b"' % b2a_base64(pack_vector(vector, encoding).data, newline=False)


def pack_vector(vector: Vectors, encoding: Encoding) -> NDArray[Any]:
    """Little-endian float32, int8 whose 127 is the largest value, or bits that are 1 where a value is above 0.

    An int8 of a scale of its own for each vector keeps cosines without a calibrated range for each dimension.
    """
    if encoding == "int8":
        largest = float(np.abs(vector).max()) or 1.0
        packed: NDArray[Any] = np.rint(vector / largest * 127).astype(np.int8)
        return packed
    if encoding == "ubinary":  # as sentence-transformers' quantize_embeddings spells it
        return np.packbits(vector > 0)
    return vector.astype("<f4", copy=False)


async def render_vectors(
    vectors: Vectors, encoding: Encoding, wrap: Callable[[int, bytes], bytes] | None = None
) -> list[bytes]:
    """Vectors as pieces of a JSON list, `wrap(index, vector)` each, without blocking the loop for long."""
    step = max(1, _SLICE_VALUES // vectors.shape[1])
    pieces: list[bytes] = []
    for start in range(0, len(vectors), step):
        if start:
            pieces.append(b",")
            await asyncio.sleep(0)
        rows = vectors[start : start + step]
        if wrap is None and encoding == "float":  # one call for all rows: an eighth less time than one for each
            pieces.append(orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        else:
            rendered = [render_vector(row, encoding) for row in rows]
            pieces.append(b",".join(map(wrap, range(start, start + len(rows)), rendered) if wrap else rendered))
    return pieces


async def send_json(send: Send, status: int, pieces: Sequence[bytes], headers: Headers = ()) -> None:
    """Send a JSON body made of `pieces`."""
    length = b"%d" % sum(map(len, pieces))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [JSON_TYPE, (b"content-length", length), *headers],
        }
    )
    for piece in pieces[:-1]:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": pieces[-1]})


def openai_error(error: ServingError) -> tuple[int, dict[str, Any]]:
    """The status of the table and the OpenAI error object."""
    return STATUS[type(error)], describe_error(error)


async def send_error(send: Send, error: ServingError, headers: Headers = (), style: ErrorStyle = openai_error) -> int:
    """Send the error object. Returns the status."""
    status, headers, body = render_error(error, headers, style)
    await send_json(send, status, [body], headers)
    return status


def render_error(
    error: ServingError, headers: Headers = (), style: ErrorStyle = openai_error
) -> tuple[int, Headers, bytes]:
    """Status, headers and body; an Overloaded also says when to come back, an InvalidApiKey how to show a key."""
    if isinstance(error, Overloaded):
        headers = [*headers, (b"retry-after", b"%d" % error.retry_after_seconds)]
    elif isinstance(error, InvalidApiKey):
        headers = [*headers, (b"www-authenticate", b'Bearer realm="thorforge"')]
    status, document = style(error)
    return status, headers, orjson.dumps(document)


def render_rest(headers: Headers, body: bytes) -> bytes:
    """All of an HTTP/1.1 answer with a JSON body that comes behind the status line."""
    fields = [JSON_TYPE, (b"content-length", b"%d" % len(body)), *headers]
    return b"".join([*(b"%b: %b\r\n" % field for field in fields), b"\r\n", body])


def describe_error(error: ServingError) -> dict[str, dict[str, Any]]:
    """The OpenAI error object: message, type, param and code."""
    status = STATUS[type(error)]
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error_code(type(error))}}


def error_code(kind: type[Exception]) -> str:
    """`InputTooLong` → `input_too_long`: the `code` of the error object and the label of the error metric."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def to_serving_error(error: Exception) -> ServingError:
    """What to tell the client about any exception of a request.

    One that nobody foresaw is logged by type and place: its message may quote the client's text, so it is neither sent
    nor logged.
    """
    if isinstance(error, ServingError):
        return error
    if isinstance(error, HTTPException):
        return _from_http_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    _log.error("request failed error=%s place=%s:%s", type(error).__name__, place.filename, place.lineno)
    return InternalError("the worker failed on this request: its log names the place")


def _from_http_exception(error: HTTPException) -> ServingError:
    if error.status_code == 404:
        return RouteNotFound("no such path: GET /docs lists those there are")
    if error.status_code == 405:
        return MethodNotAllowed(f"the path does not answer this method, it answers {(error.headers or {})['Allow']}")
    return InvalidRequest(f"the request was refused with status {error.status_code}")
