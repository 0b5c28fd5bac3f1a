"""What the engine process and its front processes say to each other: frames on one stream. Pure.

A frame is the number of bytes that follow (uint32), its kind (uint8), its subject (uint32: the number of a request, a
service or a table) and a payload, all little-endian. Ids and vectors are arrays of uint32 and float32; the rest is JSON
of the shapes below, perhaps with bytes behind it. Nothing is unpickled.
"""

import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from registry.manifest import Manifest
from serving.served import Phase
from serving.tokenizer import Ids

# 2,048 texts of 8,192 tokens, or as many vectors of 8,192 values, take 64 MiB.
MAX_FRAME_BYTES = 256 * 1024 * 1024

_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<IBI")
_EMBED = struct.Struct("<IdI")  # service, arrival, number of texts; their lengths and ids follow
_VECTORS = struct.Struct("<dI")  # engine seconds, dimension; the values follow

Payload = bytes | memoryview


class StreamBroken(Exception):
    """What came is no frame of ours: the stream cannot go on."""


class Kind(IntEnum):
    """What a frame is. The engine process sends the first ones, a front those from EMBED on."""

    SETTINGS = 1
    MODEL = 2
    TABLE = 3
    VECTORS = 4
    FAILURE = 5
    ANSWER = 6
    EMBED = 7
    CANCEL = 8  # nobody waits for the request any more
    CALL = 9
    APPLIED = 10  # the front sends new requests by this table
    RELEASED = 11  # the front has sent its last request to this service
    COUNTS = 12
    SAMPLE = 13


_KINDS = {int(kind): kind for kind in Kind}


class Frame(NamedTuple):
    """One frame as it came."""

    kind: Kind
    subject: int
    payload: Payload


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelDocument(_Document):
    """A service, without its engine; the tokenizer's JSON follows."""

    name: str
    manifest: Manifest
    runtime: str
    has_custom_kernels: bool


class Table(_Document):
    """What is served: by model, the services and their weights in the order they were loaded."""

    phase: Phase
    default: str | None
    models: dict[str, tuple[tuple[int, float], ...]]


class Failure(_Document):
    """An error by its class. `stands`: until something is answered, the next request would be refused as well."""

    error: str
    message: str
    param: str | None
    retry_after_seconds: float | None = None
    stands: bool = False


class Call(_Document):
    """A request of HTTP that the engine process answers; its body follows. Headers are latin-1."""

    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]


class Answer(_Document):
    """The answer to a call; its body follows."""

    status: int
    headers: tuple[tuple[str, str], ...]


class Counts(_Document):
    """What a front has counted since the last ones.

    `answers`: model, version, seconds of each. `failures`: model, version, status, error and how many. `tls_reloads`:
    outcome of each.
    """

    answers: tuple[tuple[str, str, tuple[float, ...]], ...]
    failures: tuple[tuple[str, str, int, str, int], ...]
    tls_reloads: tuple[str, ...]


class Sample(_Document):
    """Texts for the request log; their vectors follow as in a VECTORS frame."""

    model: str
    model_version: str
    prompt: str | None
    texts: tuple[str, ...]


class Embed(NamedTuple):
    """Ids of a request's texts, for a service; `arrival` on the machine's monotonic clock."""

    service: int
    arrival: float
    rows: list[Ids]


class FrameReader:
    """Cuts what comes on a stream into frames."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        """A frame of more than `max_bytes` is not waited for."""
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self.num_missing = _HEAD.size  # bytes without which there is no further frame

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete with `data`. Raises StreamBroken, after which there is no more to read."""
        if self._parts:
            self._parts.append(data)
            self.num_missing -= len(data)
            if self.num_missing > 0:
                return []
            data = b"".join(self._parts)
        frames: list[Frame] = []
        view, start = memoryview(data), 0
        while True:
            end = start + _HEAD.size
            if end <= len(data):
                length, kind, subject = _HEAD.unpack_from(data, start)
                if kind not in _KINDS or not _HEAD.size <= length + _LENGTH.size <= self._max_bytes:
                    raise StreamBroken(f"a frame of kind {kind} and {length} bytes, limit {self._max_bytes}")
                end = start + _LENGTH.size + length
            if end > len(data):
                self.num_missing = end - len(data)
                self._parts = [data[start:]] if start < len(data) else []
                return frames
            frames.append(Frame(_KINDS[kind], subject, view[start + _HEAD.size : end]))
            start = end


def pack(kind: Kind, subject: int = 0, *parts: Payload) -> bytes:
    """A frame of these parts."""
    size = sum(len(part) for part in parts)
    return b"".join((_HEAD.pack(_HEAD.size - _LENGTH.size + size, kind, subject), *parts))


def frame_bytes(num_texts: int, num_values: int) -> int:
    """At least the bytes of a frame with so many texts and so many ids or values."""
    return 64 + 4 * (num_texts + num_values)


def encode_embed(service: int, arrival: float, rows: Sequence[Ids]) -> bytes:
    """Payload of an EMBED frame; there is a row at least, and an id in each."""
    lengths = np.fromiter(map(len, rows), dtype="<u4", count=len(rows))
    ids = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return b"".join((_EMBED.pack(service, arrival, len(rows)), lengths.tobytes(), ids.astype("<u4").tobytes()))


def decode_embed(payload: Payload) -> Embed:
    """The request of an EMBED frame. Raises StreamBroken."""
    service, arrival, count = _unpack(_EMBED, payload)
    start = _EMBED.size + 4 * count
    if not math.isfinite(arrival) or count < 1 or len(payload) <= start or len(payload) % 4:
        raise StreamBroken(f"a request of {count} texts in {len(payload)} bytes")
    lengths = np.frombuffer(payload, "<u4", count, _EMBED.size).tolist()
    ids = np.frombuffer(payload, "<u4", offset=start).astype(np.int64)
    ends = list(accumulate(lengths))
    if ends[-1] != len(ids) or 0 in lengths:
        raise StreamBroken(f"a request of {count} texts whose lengths do not fit its {len(ids)} ids")
    rows = [ids] if count == 1 else [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return Embed(service, arrival, rows)


def encode_vectors(engine_seconds: float, vectors: NDArray[np.float32]) -> tuple[bytes, memoryview]:
    """Payload of a VECTORS frame, of float32 [N, D], in two parts: the values are not copied before they are sent."""
    values = np.ascontiguousarray(vectors, dtype="<f4").data.cast("B")
    return _VECTORS.pack(engine_seconds, vectors.shape[1]), values


def decode_vectors(payload: Payload) -> tuple[float, NDArray[np.float32]]:
    """Engine seconds and vectors, float32 [N, D], not to be written to. Raises StreamBroken."""
    engine_seconds, dimension = _unpack(_VECTORS, payload)
    size = len(payload) - _VECTORS.size
    if not math.isfinite(engine_seconds) or dimension < 1 or size < 1 or size % (4 * dimension):
        raise StreamBroken(f"vectors of {dimension} values in {size} bytes")
    values = np.frombuffer(payload, "<f4", offset=_VECTORS.size)
    return engine_seconds, values.astype(np.float32).reshape(-1, dimension)


def encode_document(document: BaseModel, *behind: Payload) -> bytes:
    """A payload of JSON and what follows it."""
    data = document.model_dump_json().encode()
    return b"".join((_LENGTH.pack(len(data)), data, *behind))


_AnyDocument = TypeVar("_AnyDocument", bound=BaseModel)


def decode_document(payload: Payload, kind: type[_AnyDocument]) -> tuple[_AnyDocument, Payload]:
    """The document, and what follows it. Raises StreamBroken."""
    (length,) = _unpack(_LENGTH, payload)
    end = _LENGTH.size + length
    if end > len(payload):
        raise StreamBroken(f"a {kind.__name__} of {length} bytes in {len(payload)}")
    try:
        return kind.model_validate_json(bytes(payload[_LENGTH.size : end])), payload[end:]
    except ValidationError:  # its text may quote a request
        raise StreamBroken(f"{length} bytes that are no {kind.__name__}") from None


def _unpack(head: struct.Struct, payload: Payload) -> tuple[Any, ...]:
    if len(payload) < head.size:
        raise StreamBroken(f"a payload of {len(payload)} bytes, {head.size} at least")
    return head.unpack_from(payload)
