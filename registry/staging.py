"""Files put in place whole: staged out of sight, hashed while they are copied, flushed, then renamed."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from registry.errors import DigestMismatch, StoreFull
from registry.manifest import FileEntry

__all__ = [
    "Progress", "copy_files", "exclusive_lock", "make_folder", "needs_room", "remove_dead_folders",
    "rename_folder", "replace_file", "staged_folder",
]  # fmt: skip

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, after every chunk."""

_CHUNK_BYTES = 1 << 20


@contextmanager
def staged_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """An empty hidden folder in `parent`, ours alone and gone at the end unless it was renamed away.

    Folders that killed processes left in `parent` for the same purpose are removed first. A live owner holds a lock on
    a file beside its folder, and the system drops the lock when the owner dies, however it dies.
    """
    remove_dead_folders(parent, purpose)
    lock, descriptor = _claim(parent, purpose)
    folder = lock.with_suffix("")
    try:
        folder.mkdir()
        yield folder
    finally:
        _discard(lock)
        os.close(descriptor)


def remove_dead_folders(parent: Path, purpose: str) -> int:
    """Remove what killed processes staged in `parent` for that purpose; returns how many folders."""
    locks = list(parent.glob(f".{purpose}-*.lock"))
    for lock in locks:
        _remove_if_dead(lock)
    return sum(not lock.exists() for lock in locks)


def copy_files(
    files: Mapping[str, FileEntry],
    open_file: Callable[[str], IO[bytes]],
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Copy `files` (name → digest and size) into `folder`, flushed to the disk, in bounded memory.

    Raises DigestMismatch, naming the file, where the bytes read are not those the table promises.
    """
    done, total = 0, sum(entry.size for entry in files.values())

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    for name, entry in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_file(name) as source:
            _copy_verified(source, target, name, entry, advance)
    for path in (folder, *folder.rglob("*/")):
        _sync_folder(path)


@contextmanager
def needs_room(place: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn a full disk or quota inside the block into StoreFull, which says what was needed, if known, and is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        needed = "" if num_bytes is None else f"{num_bytes} bytes needed, "
        raise StoreFull(f"{place} is full: {needed}{free} bytes free") from None


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread; waits for its owner."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each one durable before the next."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Replace a small file so that a reader, or a crash, sees the old bytes or the new. Callers hold a lock."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def rename_folder(folder: Path, target: Path) -> bool:
    """Rename a staged folder to `target`, durably; False where a folder that is not empty lies there."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    _sync_folder(target.parent)
    return True


def _claim(parent: Path, purpose: str) -> tuple[Path, int]:
    while True:
        lock = parent / f".{purpose}-{secrets.token_hex(8)}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if lock.exists():
            return lock, descriptor
        # Between our open and our lock somebody took the file for a dead owner's and removed it.
        os.close(descriptor)


def _remove_if_dead(lock: Path) -> None:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except (FileNotFoundError, PermissionError):  # its owner has just finished, or is another user
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _discard(lock)
    except BlockingIOError:  # its owner lives
        return
    finally:
        os.close(descriptor)


def _discard(lock: Path) -> None:
    folder = lock.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # else the lock file stays, so that the next owner tries again
        lock.unlink(missing_ok=True)


def _copy_verified(
    source: IO[bytes], target: Path, name: str, entry: FileEntry, advance: Callable[[int], None]
) -> None:
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as copy:
        # A source longer than promised is wrong already: it may not fill the disk first.
        while size <= entry.size and (chunk := source.read(_CHUNK_BYTES)):
            copy.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
        copy.flush()
        os.fsync(copy.fileno())
    if (digest.hexdigest(), size) != (entry.sha256, entry.size):
        raise DigestMismatch(f"{name} has digest {digest.hexdigest()} ({size} bytes), the manifest says {entry.sha256}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
