"""Large files to and from a bucket: in parts, several at a time, resumed where they broke, in bounded memory."""

import hashlib
import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

from registry.errors import BundleIncomplete, DigestMismatch
from registry.manifest import FileEntry
from registry.store import Bucket, Part

__all__ = ["PART_BYTES", "open_object", "upload_file"]

PART_BYTES = 8 << 20
_MAX_PARTS = 10_000
_NUM_PARALLEL = 4
Advance = Callable[[int], None]


def upload_file(bucket: Bucket, key: str, path: Path, entry: FileEntry, advance: Advance) -> None:
    """Upload `path` as the object `key`, or find it there; `advance` hears of every part that is safe.

    The parts of an upload that broke off are not sent again. Raises DigestMismatch where the file is not `entry` (any
    more), or where the object is another file.
    """
    if entry.size > PART_BYTES and bucket.head(key) is None:
        is_ours = _upload_in_parts(bucket, key, path, entry, advance)
    else:
        is_ours = entry.size <= PART_BYTES and _upload_whole(bucket, key, path, entry)
        advance(entry.size)
    if not is_ours:
        _check_stored(bucket, key, entry)


def open_object(bucket: Bucket, key: str) -> IO[bytes] | None:
    """A stream of the object, the next parts on their way while one is read; None where there is no such object."""
    first = bucket.read_part(key, 0, PART_BYTES)
    if first is None:
        return None
    return io.BufferedReader(_PartReader(bucket, key, first), 1 << 20)


class _PartReader(io.RawIOBase):
    """Reads an object's parts in order; `_NUM_PARALLEL` of them are fetched ahead."""

    def __init__(self, bucket: Bucket, key: str, first: Part) -> None:
        self._bucket, self._key, self._etag, self._total = bucket, key, first.etag, first.total
        self._left = memoryview(first.data)
        self._next = len(first.data)
        self._fetching: deque[Future[bytes]] = deque()
        self._pool = ThreadPoolExecutor(_NUM_PARALLEL) if self._next < self._total else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]  # what a stream is given
        self._fetch_ahead()
        if not self._left and self._fetching:
            self._left = memoryview(self._fetching.popleft().result())
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        super().close()

    def _fetch_ahead(self) -> None:
        while self._pool is not None and self._next < self._total and len(self._fetching) < _NUM_PARALLEL:
            self._fetching.append(self._pool.submit(self._fetch, self._next))
            self._next += PART_BYTES

    def _fetch(self, start: int) -> bytes:
        length = min(PART_BYTES, self._total - start)
        part = self._bucket.read_part(self._key, start, length, self._etag)
        if part is None or len(part.data) != length:
            raise BundleIncomplete(f"{self._key} in {self._bucket} was changed or deleted while it was read")
        return part.data


def _upload_whole(bucket: Bucket, key: str, path: Path, entry: FileEntry) -> bool:
    with path.open("rb") as stream:
        data = stream.read(entry.size + 1)
    _check_is(entry, hashlib.sha256(data).hexdigest(), len(data), path)
    return bucket.put(key, data, sha256=entry.sha256)


def _upload_in_parts(bucket: Bucket, key: str, path: Path, entry: FileEntry, advance: Advance) -> bool:
    begun = [upload_id for found, upload_id, _ in bucket.list_uploads(key) if found == key]
    upload_id = begun[-1] if begun else bucket.begin_upload(key, entry.sha256)
    present = bucket.list_parts(key, upload_id) if begun else {}
    etags = dict[int, str]()
    sending: deque[tuple[int, int, Future[str]]] = deque()
    digest, size = hashlib.sha256(), 0

    def settle_oldest() -> None:
        number, num_bytes, future = sending.popleft()
        etags[number] = future.result()
        advance(num_bytes)

    with ThreadPoolExecutor(_NUM_PARALLEL) as pool, path.open("rb") as stream:
        while size <= entry.size and (data := stream.read(_part_bytes(entry.size))):
            digest.update(data)
            size += len(data)
            number = len(etags) + len(sending) + 1
            if present.get(number) == f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"':
                etags[number] = present[number]
                advance(len(data))
                continue
            if len(sending) == _NUM_PARALLEL:
                settle_oldest()
            sending.append((number, len(data), pool.submit(bucket.put_part, key, upload_id, number, data)))
        while sending:
            settle_oldest()
    try:
        _check_is(entry, digest.hexdigest(), size, path)
    except DigestMismatch:
        bucket.abort_upload(key, upload_id)
        raise
    return bucket.complete_upload(key, upload_id, etags)


def _part_bytes(size: int) -> int:
    """The same for every upload of the same file, so that its parts can be told apart."""
    return max(PART_BYTES, -(-size // _MAX_PARTS))


def _check_is(entry: FileEntry, sha256: str, size: int, path: Path) -> None:
    if (sha256, size) != (entry.sha256, entry.size):
        raise DigestMismatch(f"{path.name} has digest {sha256} ({size} bytes), the manifest says {entry.sha256}")


def _check_stored(bucket: Bucket, key: str, entry: FileEntry) -> None:
    head = bucket.head(key)
    if head is None or (head.sha256, head.size) != (entry.sha256, entry.size):
        found = f"{head.size} bytes, SHA-256 {head.sha256}" if head else "gone again"
        raise DigestMismatch(f"{key} in {bucket} is another file ({found}), the manifest says {entry.sha256}")
