"""Pulled bundles that processes share: one of them copies a bundle, all may use it, and what nobody uses makes room.

Below the cache's folder lies `<model>/<digest>/`, and beside each such folder `.<digest>.lock`: its copying and its
eviction exclude one another there, and its time is when the bundle was last asked for. Whoever uses a bundle, a worker
that serves it as well, holds a shared lock on its manifest (`registry.manifest.hold_bundle`), which dies with the
process; an evictor has to get that lock for itself.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from registry.client import pull, resolve
from registry.manifest import MANIFEST_NAME, hold_bundle, is_digest
from registry.settings import load_settings
from registry.staging import Progress, exclusive_lock, make_folder, rename_folder, staged_folder
from registry.store import Store

__all__ = ["evict", "fetched"]

_log = logging.getLogger("thorforge.cache")


@dataclass(frozen=True, slots=True)
class _Cached:
    """One bundle of a cache, what it takes with all that lies beside it, and when it was last asked for."""

    folder: Path
    size_bytes: int
    used_at: float

    @property
    def lock(self) -> Path:
        return _lock_of(self.folder)


@contextmanager
def fetched(store: Store, model: str, reference: str, cache: Path, progress: Progress | None = None) -> Iterator[Path]:
    """The folder of a verified bundle in the folder `cache`; it stays for as long as the block runs.

    Where it had to be copied, bundles that nobody uses are evicted down to `registry.cache_bytes`. Raises what `pull`
    raises.
    """
    digest = resolve(store, model, reference)
    folder = cache / model / digest
    make_folder(folder.parent)
    with exclusive_lock(_lock_of(folder)):
        is_new = not folder.exists()
        pull(store, model, digest, folder, progress)
        os.utime(_lock_of(folder))
        held = hold_bundle(folder)
    try:
        if is_new:
            evict(cache, load_settings().cache_bytes)
        yield folder
    finally:
        os.close(held)


def evict(cache: Path, max_bytes: int) -> list[Path]:
    """Delete bundles that nobody uses, the one asked for longest ago first, until `max_bytes` hold; returns which."""
    found = sorted(_list_cached(cache), key=lambda cached: cached.used_at)
    total, evicted = sum(cached.size_bytes for cached in found), []
    for cached in found:
        if total <= max_bytes:
            break
        if _evict_one(cached):
            total -= cached.size_bytes
            evicted.append(cached.folder)
            _log.info("bundle evicted folder=%s size_bytes=%d", cached.folder, cached.size_bytes)
    if total > max_bytes:
        _log.warning("cache over its limit, all of it in use folder=%s bytes=%d limit=%d", cache, total, max_bytes)
    return evicted


def _list_cached(cache: Path) -> Iterator[_Cached]:
    """What `fetched` has put there: other folders are not ours to delete."""
    for folder in cache.glob("*/*/"):
        if is_digest(folder.name) and _lock_of(folder).exists():
            with suppress(FileNotFoundError):  # another process is evicting it
                files = [file for place in (folder, *_beside(folder)) for file in (place, *place.rglob("*"))]
                sizes = [file.stat().st_size for file in files if file.is_file()]
                yield _Cached(folder, sum(sizes), _lock_of(folder).stat().st_mtime)


def _evict_one(cached: _Cached) -> bool:
    """Delete one bundle and what engines keep beside it, unless somebody copies or uses it."""
    with _lock_now(cached.lock) as is_idle, _lock_now(cached.folder / MANIFEST_NAME) as is_unused:
        if not (is_idle and is_unused):
            return False
        with staged_folder(cached.folder.parent, "evict") as staged:
            if not rename_folder(cached.folder, staged):
                return False
    for place in _beside(cached.folder):
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    return True


@contextmanager
def _lock_now(path: Path) -> Iterator[bool]:
    """Whether this process got the lock of a file, without waiting for who has it; False where it cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDWR)  # not to write: over NFS an exclusive lock takes that
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _beside(folder: Path) -> list[Path]:
    """What a worker keeps for a bundle: `<digest>.plans`, `<digest>.engine.json`."""
    return list(folder.parent.glob(f"{folder.name}.*"))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
