"""The store in a folder of one file system."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from registry import keys, manifest
from registry.errors import BundleIncomplete, BundleNotFound, SignatureInvalid
from registry.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest
from registry.staging import (
    Progress,
    copy_files,
    exclusive_lock,
    make_folder,
    needs_room,
    remove_dead_folders,
    rename_folder,
    replace_file,
    staged_folder,
)

__all__ = ["FolderStore"]


class FolderStore:
    """A store in a folder of one file system, safe for many processes at once; made by the first push.

    `models/<model>/<digest>/` holds bundles, every other folder records. Hidden names are work in progress.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def list_models(self) -> list[str]:
        """Every model that has a bundle, in order."""
        return [name for name in _folders(self.root / "models") if self.list_digests(name)]

    def list_digests(self, model: str) -> list[str]:
        """The full digests of a model's bundles, in order; empty for an unknown model."""
        return [name for name in _folders(self._model_folder(model)) if manifest.is_digest(name)]

    def list_published(self, model: str) -> dict[str, datetime]:
        """When each of a model's bundles was published, by digest; their contents are not looked at."""
        folder = self._model_folder(model)
        times = ((digest, (folder / digest).stat().st_mtime) for digest in self.list_digests(model))
        return {digest: datetime.fromtimestamp(seconds, UTC) for digest, seconds in times}

    def has_bundle(self, model: str, digest: str) -> bool:
        """Whether the bundle is there."""
        return manifest.is_digest(digest) and self._bundle_folder(model, digest).is_dir()

    def list_files(self, model: str, digest: str) -> list[str]:
        """Every file of a bundle, the manifest too. Raises BundleNotFound, BundleIncomplete (holds a link)."""
        return manifest.list_files(self._existing(model, digest))

    def open_file(self, model: str, digest: str, name: str) -> IO[bytes]:
        """Open one file of a bundle for reading. Raises BundleNotFound, BundleIncomplete (no such file)."""
        try:
            return (self._existing(model, digest) / name).open("rb")
        except FileNotFoundError:
            raise BundleIncomplete(f"{name} of {model} {digest} is missing from {self}") from None

    def put_bundle(self, bundle: Path, digest: str, contents: Manifest, progress: Progress | None = None) -> None:
        """Publish the folder `bundle` whole or not at all; nothing happens where `digest` is already there.

        Raises DigestMismatch (a file changed under our hands), StoreFull.
        """
        target = self._bundle_folder(contents.model_name, digest)
        if target.is_dir():
            return
        own_entry = FileEntry(sha256=digest, size=(bundle / MANIFEST_NAME).stat().st_size)
        files = {**contents.files, MANIFEST_NAME: own_entry}
        with needs_room(self.root, sum(entry.size for entry in files.values())):
            make_folder(self.root)
            with staged_folder(self.root, "push") as staged:
                copy_files(files, lambda name: (bundle / name).open("rb"), staged, progress)
                make_folder(target.parent)
                # Somebody else's copy of the same digest holds the same bytes, so losing that race is success.
                rename_folder(staged, target)

    def put_signature(self, model: str, digest: str, signature: bytes) -> None:
        """Add its signature to a bundle, once. Raises BundleNotFound, SignatureInvalid (it has another), StoreFull."""
        target = self._existing(model, digest) / SIGNATURE_NAME
        with needs_room(self.root, len(signature)), exclusive_lock(self.root / ".records.lock"):
            if not target.exists():
                replace_file(target, signature)
            elif target.read_bytes() != signature:
                raise SignatureInvalid(f"bundle {digest} of {model} in {self} has another signature already")

    def delete_bundle(self, model: str, digest: str) -> None:
        """Delete a bundle: it disappears whole, at once. Nothing happens where it is not there."""
        folder = self._bundle_folder(model, digest)
        if folder.is_dir():
            # Not flushed to the disk, which takes 12 ms: a bundle that a crash brings back is collected again.
            with staged_folder(self.root, "delete") as staged, suppress(FileNotFoundError):
                folder.rename(staged)

    def delete_leftovers(self, min_age: timedelta) -> int:
        """Drop what killed processes have left behind, however old: their locks say that they are dead."""
        return sum(remove_dead_folders(self.root, purpose) for purpose in ("push", "delete"))

    def read_record(self, key: str) -> bytes | None:
        """The record's bytes, or None where there is none."""
        try:
            return self._record_path(key).read_bytes()
        except FileNotFoundError:
            return None

    def swap_record(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Write `data` if the record is still `expected` (None: absent); False, and no change, if it is not."""
        path = self._record_path(key)
        with needs_room(self.root, len(data)):
            make_folder(path.parent)
            with exclusive_lock(self.root / ".records.lock"):
                if self.read_record(key) != expected:
                    return False
                replace_file(path, data)
                return True

    def _model_folder(self, model: str) -> Path:
        keys.check_model_name(model)
        return self.root / "models" / model

    def _bundle_folder(self, model: str, digest: str) -> Path:
        keys.check_digest(digest)
        return self._model_folder(model) / digest

    def _existing(self, model: str, digest: str) -> Path:
        folder = self._bundle_folder(model, digest)
        if not folder.is_dir():
            raise BundleNotFound(f"no bundle {digest} of {model} in {self}")
        return folder

    def _record_path(self, key: str) -> Path:
        return self.root.joinpath(*keys.split_record_key(key))


def _folders(parent: Path) -> list[str]:
    """The folders in `parent` that are not hidden work in progress; empty where `parent` is missing."""
    try:
        return sorted(entry.name for entry in parent.iterdir() if manifest.is_name(entry.name) and entry.is_dir())
    except FileNotFoundError:
        return []
