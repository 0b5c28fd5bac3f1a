"""Where bundles and records lie: the protocol every store keeps, and the store in a folder."""

import os
from pathlib import Path
from typing import IO, Protocol

from registry import manifest
from registry.errors import BundleIncomplete, BundleNotFound, ReferenceInvalid
from registry.manifest import MANIFEST_NAME, FileEntry, Manifest
from registry.staging import (
    Progress,
    copy_files,
    exclusive_lock,
    make_folder,
    needs_room,
    rename_folder,
    replace_file,
    staged_folder,
)

__all__ = [
    "REGISTRY_VARIABLE",
    "STATE_VARIABLE",
    "FolderStore",
    "Progress",
    "Store",
    "check_model_name",
    "default_registry",
]

STATE_VARIABLE = "THORFORGE_HOME"
REGISTRY_VARIABLE = "THORFORGE_REGISTRY"


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

    def read_record(self, key: str) -> bytes | None:
        """The record's bytes, or None where there is none."""
        ...

    def swap_record(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Write `data` if the record is still `expected` (None: absent); False, and no change, if it is not."""
        ...


class FolderStore:
    """A store in a folder of one file system, safe for many processes at once; made by the first push.

    `models/<model>/<digest>/` holds bundles, every other folder records. Hidden names are work in progress.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def list_models(self) -> list[str]:
        """Every model that has a bundle, in order."""
        return [name for name in _folders(self.root / "models") if self.list_digests(name)]

    def list_digests(self, model: str) -> list[str]:
        """The full digests of a model's bundles, in order; empty for an unknown model."""
        return [name for name in _folders(self._model_folder(model)) if manifest.is_digest(name)]

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
        check_model_name(model)
        return self.root / "models" / model

    def _bundle_folder(self, model: str, digest: str) -> Path:
        if not manifest.is_digest(digest):
            raise ReferenceInvalid(f"{digest!r} is not a digest: use 64 hex digits")
        return self._model_folder(model) / digest

    def _existing(self, model: str, digest: str) -> Path:
        folder = self._bundle_folder(model, digest)
        if not folder.is_dir():
            raise BundleNotFound(f"no bundle {digest} of {model} in {self}")
        return folder

    def _record_path(self, key: str) -> Path:
        parts = key.split("/")
        if len(parts) < 2 or parts[0] == "models" or not all(map(manifest.is_name, parts)):
            raise ReferenceInvalid(f"{key!r} is not the key of a record: use names joined by '/'")
        return self.root.joinpath(*parts)


def default_registry() -> Path:
    """The folder registry: `$THORFORGE_REGISTRY`, by default `registry` of the state folder, `$THORFORGE_HOME`."""
    state = Path(os.environ.get(STATE_VARIABLE, ".thorforge"))
    return Path(os.environ.get(REGISTRY_VARIABLE) or state / "registry").absolute()


def check_model_name(model: str) -> None:
    """Refuse, as ReferenceInvalid, what cannot be a model's name before it becomes part of a path."""
    if not manifest.is_name(model):
        raise ReferenceInvalid(f"{model!r} is not a model name: use 1 to 128 letters, digits, '.', '_' or '-'")


def _folders(parent: Path) -> list[str]:
    """The folders in `parent` that are not hidden work in progress; empty where `parent` is missing."""
    try:
        return sorted(entry.name for entry in parent.iterdir() if manifest.is_name(entry.name) and entry.is_dir())
    except FileNotFoundError:
        return []
