"""Where bundles and records lie: the protocol every store keeps."""

import os
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol

from registry.folder_store import FolderStore
from registry.keys import check_model_name
from registry.manifest import Manifest
from registry.staging import Progress

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

    def delete_bundle(self, model: str, digest: str) -> None:
        """Delete a bundle: it disappears whole, at once; its bytes may go later. Nothing happens where it is not."""
        ...

    def read_record(self, key: str) -> bytes | None:
        """The record's bytes, or None where there is none."""
        ...

    def swap_record(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Write `data` if the record is still `expected` (None: absent); False, and no change, if it is not.

        Where the answer to a write got lost on a network, finding the very bytes `data` counts as having written them.
        """
        ...


def default_registry() -> Path:
    """The folder registry: `$THORFORGE_REGISTRY`, by default `registry` of the state folder, `$THORFORGE_HOME`."""
    state = Path(os.environ.get(STATE_VARIABLE, ".thorforge"))
    return Path(os.environ.get(REGISTRY_VARIABLE) or state / "registry").absolute()
