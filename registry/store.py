"""Where bundles and records lie: the protocol every store keeps, and the one place that speaks S3 (boto3)."""

import base64
import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import parse_qs, urlsplit

from registry.errors import ReferenceInvalid, StoreFull, StoreUnavailable
from registry.folder_store import FolderStore
from registry.keys import check_model_name
from registry.manifest import Manifest
from registry.settings import configured_place
from registry.staging import Progress

__all__ = [
    "REGISTRY_VARIABLE", "STATE_VARIABLE", "Bucket", "FolderStore", "Head", "Listed", "Part", "Place", "Progress",
    "Store", "check_model_name", "default_registry", "open_store",
]  # fmt: skip

STATE_VARIABLE = "THORFORGE_HOME"
REGISTRY_VARIABLE = "THORFORGE_REGISTRY"

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_MAX_ATTEMPTS = 8
_MAX_PAUSE_SECONDS = 8.0
_RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
_RETRIED_CODES = ("ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling")
_MISSING_CODES = ("404", "NoSuchKey", "NoSuchUpload", "NotFound")
_FULL_CODES = ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", "InsufficientStorage")

Result = TypeVar("Result")
Place = str | Path
"""A folder, or `s3://bucket/prefix`, with `?endpoint=https://…` for a server that is not Amazon's."""


class Store(Protocol):
    """Bundles, which are written once and never change, and records, which change by compare-and-swap alone.

    A record is a small document under a key such as `channels/minilm/production.json`: names joined by slashes.
    `str(store)` says where it is. Names and keys that are no names raise ReferenceInvalid.
    """

    def list_models(self) -> list[str]:
        """Every model that has a bundle, in order."""
        ...

    def list_digests(self, model: str) -> list[str]:
        """The full digests of a model's bundles, in order; empty for an unknown model."""
        ...

    def list_published(self, model: str) -> dict[str, datetime]:
        """When each of a model's bundles was published, by digest; their contents are not looked at."""
        ...

    def has_bundle(self, model: str, digest: str) -> bool:
        """Whether the bundle is there."""
        ...

    def list_files(self, model: str, digest: str) -> list[str]:
        """Every file of a bundle, the manifest too. Raises BundleNotFound, BundleIncomplete (holds a link)."""
        ...

    def open_file(self, model: str, digest: str, name: str) -> IO[bytes]:
        """Open one file of a bundle for reading. Raises BundleNotFound, BundleIncomplete (no such file)."""
        ...

    def put_bundle(self, bundle: Path, digest: str, contents: Manifest, progress: Progress | None = None) -> None:
        """Publish the folder `bundle` whole or not at all; nothing happens where `digest` is already there.

        `contents` is the manifest whose bytes hash to `digest`. Raises DigestMismatch (a file changed under our
        hands), StoreFull.
        """
        ...

    def put_signature(self, model: str, digest: str, signature: bytes) -> None:
        """Add its signature to a bundle, once. Raises BundleNotFound, SignatureInvalid (it has another), StoreFull."""
        ...

    def delete_bundle(self, model: str, digest: str) -> None:
        """Delete a bundle: it disappears whole, at once; its bytes may go later. Nothing happens where it is not."""
        ...

    def delete_leftovers(self, min_age: timedelta) -> int:
        """Drop what pushes that never ended have left behind, if it is that old; returns how many things."""
        ...

    def read_record(self, key: str) -> bytes | None:
        """The record's bytes, or None where there is none."""
        ...

    def swap_record(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Write `data` if the record is still `expected` (None: absent); False, and no change, if it is not.

        Where the answer to a write got lost on a network, finding the very bytes `data` counts as having written them.
        """
        ...


def open_store(place: Place | None = None) -> Store:
    """The store at `place`, by default `default_registry()`. Raises ReferenceInvalid for an URL it cannot read."""
    place = place or default_registry()
    if isinstance(place, Path) or "://" not in place:
        return FolderStore(Path(place))
    from registry.s3_store import S3Store  # noqa: PLC0415  it needs what is below

    return S3Store(place)


def default_registry() -> Place:
    """`$THORFORGE_REGISTRY`, else `optimize.registry` of `thorforge.toml`: a folder or `s3://` URL.

    By default `registry` of the state folder, `$THORFORGE_HOME`. Raises SettingsInvalid.
    """
    state = Path(os.environ.get(STATE_VARIABLE, ".thorforge"))
    place = os.environ.get(REGISTRY_VARIABLE) or configured_place()
    return place if place and "://" in place else Path(place or state / "registry").absolute()


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an object without reading it; `sha256` is what the writer said of its content."""

    size: int
    etag: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing, or with `modified` None a folder; `key` is without the bucket's prefix."""

    key: str
    modified: datetime | None


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of an object, its ETag, and its whole size."""

    data: bytes
    etag: str
    total: int


class Bucket:
    """The objects below `s3://bucket/prefix`: what S3 can do, retried with backoff, its refusals as our errors.

    Operations raise StoreUnavailable (not reachable, or refused, with the server's reason), StoreFull. Keys are
    relative to the prefix.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 30,
        pause_seconds: float = 0.2,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """The URL's `?endpoint=` is used, else AWS's own variables; region and keys are as boto3 finds them."""
        self.name, self._prefix, endpoint = _split_url(url)
        self.url = f"s3://{self.name}/{self._prefix}".rstrip("/")
        self._pause_seconds, self._sleep = pause_seconds, sleep
        self._client, self._transient = _connect(endpoint, timeout_seconds)

    def __str__(self) -> str:
        return self.url

    def read_part(self, key: str, start: int, length: int, etag: str | None = None) -> Part | None:
        """Up to `length` bytes from `start`, or None where there is no such object, or not with that `etag` any more.

        A connection that breaks in mid-body goes on where it broke.
        """
        data, wanted = bytearray(), {"IfMatch": etag} if etag else {}
        total = -1

        def read(**params: Any) -> Part:
            nonlocal total
            first, last = start + len(data), start + length - 1
            if total < 0 or first < min(start + length, total):
                response = self._client.get_object(**params, **wanted, Range=f"bytes={first}-{last}")
                wanted["IfMatch"] = response["ETag"]
                with contextlib.closing(response["Body"]) as body:
                    if "ContentRange" not in response:
                        raise StoreUnavailable(f"{self} answers a request for a range of {key} with the whole object")
                    total = int(response["ContentRange"].rpartition("/")[2])
                    for chunk in body.iter_chunks(1 << 16):
                        data.extend(chunk)
            return Part(bytes(data), wanted["IfMatch"], total)

        try:
            return self._call(read, key)
        except _EmptyRange:  # an empty object has no first byte
            head = self.head(key)
            return Part(b"", head.etag, head.size) if head else None
        except (_Missing, _Conflict):
            return None

    def head(self, key: str) -> Head | None:
        """Size, ETag and the SHA-256 it was uploaded with; None where there is no such object."""
        try:
            response = self._call(self._client.head_object, key)
        except _Missing:
            return None
        return Head(response["ContentLength"], response["ETag"], response["Metadata"].get("sha256"))

    def put(self, key: str, data: bytes, *, etag: str | None = None, sha256: str = "") -> bool:
        """Create an object or, with `etag`, replace the one that still has it; False, and no change, if it cannot.

        An object that is found to be `data` already counts as written: the answer to the first try may have got lost.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            self._call(self._client.put_object, key, Body=data, **condition, **_described(data, sha256))
        except (_Conflict, _Missing):
            found = self.read_part(key, 0, len(data) + 1)
            return found is not None and found.data == data
        return True

    def delete(self, key: str) -> None:
        """Delete an object; nothing happens where there is none."""
        with contextlib.suppress(_Missing):
            self._call(self._client.delete_object, key)

    def list_keys(self, prefix: str, *, is_flat: bool = False) -> Iterator[Listed]:
        """The objects and folders right below `prefix`, which ends in a slash; with `is_flat` all objects below it."""
        params: dict[str, Any] = {"Prefix": self._full(prefix), **({} if is_flat else {"Delimiter": "/"})}
        while True:
            page = self._call(self._client.list_objects_v2, None, **params)
            for item in page.get("CommonPrefixes", ()):
                yield Listed(self._relative(item["Prefix"]), None)
            for item in page.get("Contents", ()):
                yield Listed(self._relative(item["Key"]), item["LastModified"])
            if not page.get("IsTruncated"):
                return
            params["ContinuationToken"] = page["NextContinuationToken"]

    def list_uploads(self, prefix: str) -> list[tuple[str, str, datetime]]:
        """Multi-part uploads below `prefix` that were begun and not completed: key, id and time."""
        page = self._call(self._client.list_multipart_uploads, None, Prefix=self._full(prefix))
        return [(self._relative(u["Key"]), u["UploadId"], u["Initiated"]) for u in page.get("Uploads", ())]

    def begin_upload(self, key: str, sha256: str) -> str:
        """Begin a multi-part upload and return its id."""
        upload_id: str = self._call(self._client.create_multipart_upload, key, Metadata={"sha256": sha256})["UploadId"]
        return upload_id

    def list_parts(self, key: str, upload_id: str) -> dict[int, str]:
        """The ETags of the parts that arrived, by number; empty for an upload that is gone."""
        parts, params = dict[int, str](), dict[str, Any]()
        while True:
            try:
                page = self._call(self._client.list_parts, key, UploadId=upload_id, **params)
            except _Missing:
                return {}
            parts |= {part["PartNumber"]: part["ETag"] for part in page.get("Parts", ())}
            if not page.get("IsTruncated"):
                return parts
            params["PartNumberMarker"] = page["NextPartNumberMarker"]

    def put_part(self, key: str, upload_id: str, number: int, data: bytes) -> str:
        """Upload one part and return its ETag."""
        checked = _described(data, "")
        etag: str = self._call(
            self._client.upload_part, key, UploadId=upload_id, PartNumber=number, Body=data, **checked
        )["ETag"]
        return etag

    def complete_upload(self, key: str, upload_id: str, etags: dict[int, str]) -> bool:
        """Make the object of its parts; False where an object of that key, or no such upload, is there."""
        parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
        try:
            self._call(
                self._client.complete_multipart_upload,
                key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except (_Conflict, _Missing):
            return False
        return True

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Drop an upload and its parts."""
        with contextlib.suppress(_Missing):
            self._call(self._client.abort_multipart_upload, key, UploadId=upload_id)

    def _call(self, operation: Callable[..., Result], key: str | None, **params: Any) -> Result:
        """Run one operation; what may pass is tried again, after a random part of a growing pause."""
        if key is not None:
            params["Key"] = self._full(key)
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return operation(Bucket=self.name, **params)
            except self._transient as error:
                fault: Exception = error
            except self._client.exceptions.ClientError as error:
                self._raise_final(error, key)
                fault = error
            pause = min(self._pause_seconds * 2**attempt, _MAX_PAUSE_SECONDS)
            self._sleep(pause * random.uniform(0.5, 1))  # noqa: S311  no secret
        raise StoreUnavailable(f"{self} does not answer, tried {_MAX_ATTEMPTS} times: {fault}") from None

    def _raise_final(self, error: Any, key: str | None) -> None:
        """Raise what trying again does not mend."""
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = error.response.get("Error", {}).get("Code", "")
        if code in _MISSING_CODES:
            raise _Missing from None
        if status == 412:
            raise _Conflict from None
        if status == 416:
            raise _EmptyRange from None
        if status == 507 or code in _FULL_CODES:
            raise StoreFull(f"{self} is full: {code}") from None
        if status not in _RETRIED_STATUS and code not in _RETRIED_CODES:
            raise StoreUnavailable(f"{self} refuses {key or 'a listing'}: {error}") from None

    def _full(self, key: str) -> str:
        return f"{self._prefix}{key}"

    def _relative(self, key: str) -> str:
        return key[len(self._prefix) :]


class _Missing(Exception):
    """No such object or upload."""


class _Conflict(Exception):
    """The object is there, or is not the one whose ETag was given."""


class _EmptyRange(Exception):
    """The object ends before the range begins."""


def _described(data: bytes, sha256: str) -> dict[str, Any]:
    """Parameters that let the server check what arrives; MD5, because every S3 server knows it."""
    checksum = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    return {"ContentMD5": checksum, **({"Metadata": {"sha256": sha256}} if sha256 else {})}


def _split_url(url: str) -> tuple[str, str, str | None]:
    """Bucket, prefix (empty, or ending in a slash) and endpoint. Raises ReferenceInvalid."""
    parts = urlsplit(url)
    options = parse_qs(parts.query, keep_blank_values=True)
    if parts.scheme != "s3" or not parts.hostname or parts.fragment or options.keys() - {"endpoint"}:
        raise ReferenceInvalid(f"{url!r} is no registry: use a folder or s3://bucket/prefix[?endpoint=https://host]")
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else "", options.get("endpoint", [None])[0]


@lru_cache(maxsize=16)  # half a second each, and safe to share among threads
def _connect(endpoint: str | None, timeout_seconds: float) -> tuple[Any, tuple[type[Exception], ...]]:
    """A client, and the errors that may pass. It does not try again by itself: `Bucket` does, where it is safe."""
    import boto3  # noqa: PLC0415  half a second that a folder's users need not wait
    from botocore.config import Config  # noqa: PLC0415
    from botocore.exceptions import HTTPClientError, IncompleteReadError  # noqa: PLC0415

    endpoint = endpoint or next(filter(None, map(os.environ.get, _ENDPOINT_VARIABLES)), None)
    config = Config(
        connect_timeout=timeout_seconds,
        read_timeout=timeout_seconds,
        retries={"total_max_attempts": 1},
        max_pool_connections=16,
        # Servers other than Amazon's know neither virtual hosts nor the newer checksums.
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    return client, (HTTPClientError, IncompleteReadError)
