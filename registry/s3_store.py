"""The store in an S3 bucket: the same folders as keys. A bundle is there once `index/<model>/<digest>` is."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from registry import keys, manifest
from registry.errors import BundleIncomplete, BundleNotFound, SignatureInvalid
from registry.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest
from registry.staging import Progress
from registry.store import Bucket
from registry.transfer import open_object, upload_file

__all__ = ["S3Store"]

_MAX_RECORD_BYTES = 8 << 20


class S3Store:
    """A store below `s3://bucket/prefix`, safe for many processes on many machines.

    `models/<model>/<digest>/` holds a bundle's files, each created once. The empty object `index/<model>/<digest>` is
    created last and deleted first, so nobody sees a bundle that is not whole. Every other key is a record.
    """

    def __init__(self, place: str | Bucket) -> None:
        self.bucket = Bucket(place) if isinstance(place, str) else place

    def __str__(self) -> str:
        return str(self.bucket)

    def list_models(self) -> list[str]:
        """Every model that has a bundle, in order."""
        names = (item.key.split("/")[1] for item in self.bucket.list_keys("index/") if item.modified is None)
        return sorted(name for name in names if manifest.is_name(name))

    def list_digests(self, model: str) -> list[str]:
        """The full digests of a model's bundles, in order; empty for an unknown model."""
        return sorted(self.list_published(model))

    def list_published(self, model: str) -> dict[str, datetime]:
        """When each of a model's bundles was published, by digest; their contents are not looked at."""
        keys.check_model_name(model)
        found = ((item.key.rpartition("/")[2], item.modified) for item in self.bucket.list_keys(f"index/{model}/"))
        return {name: modified for name, modified in found if modified is not None and manifest.is_digest(name)}

    def has_bundle(self, model: str, digest: str) -> bool:
        """Whether the bundle is there."""
        return manifest.is_digest(digest) and self.bucket.head(_index_key(model, digest)) is not None

    def list_files(self, model: str, digest: str) -> list[str]:
        """Every file of a bundle, the manifest too. Raises BundleNotFound."""
        prefix = _bundle_prefix(model, digest)
        if not self.has_bundle(model, digest):
            raise BundleNotFound(f"no bundle {digest} of {model} in {self}")
        return sorted(item.key[len(prefix) :] for item in self.bucket.list_keys(prefix, is_flat=True))

    def open_file(self, model: str, digest: str, name: str) -> IO[bytes]:
        """Open one file of a bundle for reading. Raises BundleNotFound, BundleIncomplete (no such file)."""
        stream = open_object(self.bucket, _bundle_prefix(model, digest) + name)
        if stream is not None:
            return stream
        if not self.has_bundle(model, digest):
            raise BundleNotFound(f"no bundle {digest} of {model} in {self}")
        raise BundleIncomplete(f"{name} of {model} {digest} is missing from {self}")

    def put_bundle(self, bundle: Path, digest: str, contents: Manifest, progress: Progress | None = None) -> None:
        """Publish the folder `bundle` whole or not at all; nothing happens where `digest` is already there.

        What an earlier push of the same bundle has left is used. Raises DigestMismatch, StoreFull, StoreUnavailable.
        """
        prefix = _bundle_prefix(contents.model_name, digest)
        if self.has_bundle(contents.model_name, digest):
            return
        own_entry = FileEntry(sha256=digest, size=(bundle / MANIFEST_NAME).stat().st_size)
        files = {**contents.files, MANIFEST_NAME: own_entry}
        done, total = 0, sum(entry.size for entry in files.values())

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        for name, entry in files.items():
            upload_file(self.bucket, prefix + name, bundle / name, entry, advance)
        self.bucket.put(_index_key(contents.model_name, digest), b"")

    def put_signature(self, model: str, digest: str, signature: bytes) -> None:
        """Add its signature to a bundle, once. Raises BundleNotFound, SignatureInvalid (it has another)."""
        if not self.has_bundle(model, digest):
            raise BundleNotFound(f"no bundle {digest} of {model} in {self}")
        if not self.bucket.put(_bundle_prefix(model, digest) + SIGNATURE_NAME, signature):
            raise SignatureInvalid(f"bundle {digest} of {model} in {self} has another signature already")

    def delete_bundle(self, model: str, digest: str) -> None:
        """Delete a bundle: it disappears whole, at once, then its bytes go. Nothing happens where it is not."""
        prefix = _bundle_prefix(model, digest)
        self.bucket.delete(_index_key(model, digest))
        for item in self.bucket.list_keys(prefix, is_flat=True):
            self.bucket.delete(item.key)

    def delete_leftovers(self, min_age: timedelta) -> int:
        """Drop uploads that were begun, and files of no bundle that were written, that long ago; returns how many."""
        before = datetime.now(UTC) - min_age
        old = [(key, upload_id) for key, upload_id, begun in self.bucket.list_uploads("models/") if begun < before]
        for key, upload_id in old:
            self.bucket.abort_upload(key, upload_id)
        num_deleted = len(old)
        for folder in [item.key for item in self.bucket.list_keys("models/") if item.modified is None]:
            model = folder.split("/")[1]
            published = self.list_published(model)
            for orphan in (item.key for item in self.bucket.list_keys(folder) if item.modified is None):
                if orphan.split("/")[2] not in published:
                    num_deleted += self._delete_old(orphan, before)
        return num_deleted

    def read_record(self, key: str) -> bytes | None:
        """The record's bytes, or None where there is none."""
        part = self.bucket.read_part("/".join(keys.split_record_key(key)), 0, _MAX_RECORD_BYTES)
        return None if part is None else part.data

    def swap_record(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Write `data` if the record is still `expected` (None: absent); False, and no change, if it is not."""
        key = "/".join(keys.split_record_key(key))
        if expected is None:
            return self.bucket.put(key, data)
        current = self.bucket.read_part(key, 0, _MAX_RECORD_BYTES)
        if current is None or current.data != expected:
            return False
        return self.bucket.put(key, data, etag=current.etag)

    def _delete_old(self, folder: str, before: datetime) -> int:
        """Delete the files of a bundle that was never published, if all are older than `before`."""
        files = list(self.bucket.list_keys(folder, is_flat=True))
        if any(item.modified is None or item.modified >= before for item in files):
            return 0
        for item in files:
            self.bucket.delete(item.key)
        return len(files)


def _bundle_prefix(model: str, digest: str) -> str:
    keys.check_model_name(model)
    keys.check_digest(digest)
    return f"models/{model}/{digest}/"


def _index_key(model: str, digest: str) -> str:
    return f"index/{model}/{digest}"
