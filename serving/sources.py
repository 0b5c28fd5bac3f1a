"""Where a bundle lies: a folder, a file that names the current one, or a name below the root of the admin API."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from registry.manifest import RegistryError, digest_of, is_digest, is_name
from serving.errors import BundleRejected, InvalidRequest

_MAX_POINTER_BYTES = 65_536
_MAX_NAME_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Located:
    """The folder of a bundle and its digest, 64 hex digits."""

    folder: Path
    digest: str


def locate_bundle(path: Path) -> Located:
    """The bundle at `path`. Reads its manifest's digest and checks nothing else.

    `path` is the folder itself or a file that names it: a channel of a folder registry, or a line of text with the
    folder's path, relative to the file's own folder. Raises BundleRejected.
    """
    try:
        folder, expected = _follow(path) if path.is_file() else (path, None)
        digest = digest_of(folder)
    except RegistryError as error:
        raise BundleRejected(str(error)) from None
    except (OSError, ValueError) as error:
        raise BundleRejected(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if expected not in (None, digest):
        raise BundleRejected(f"{path} names digest {expected}, but {folder} holds {digest}")
    return Located(folder, digest)


def find_bundle(root: Path | None, name: str) -> Path:
    """The folder `name` below `root`. Raises InvalidRequest for one that is not there, links followed."""
    if root is None:
        raise InvalidRequest(
            "not a configured bundle, and embedding.models.root, where others could lie, is not set", "bundle"
        )
    path = PurePosixPath(name)
    if (
        not name.isprintable()
        or "\\" in name
        or path.is_absolute()
        or ".." in path.parts
        or len(name) > _MAX_NAME_CHARS
    ):
        raise InvalidRequest("bundle must be a plain relative path below embedding.models.root", "bundle")
    try:
        base = root.resolve(strict=True)
        folder = (base / path).resolve(strict=True)
        is_inside = folder != base and folder.is_relative_to(base) and folder.is_dir()
    except (OSError, RuntimeError):  # missing, unreadable, or links in a circle
        is_inside = False
    if not is_inside:
        raise InvalidRequest("there is no such folder below embedding.models.root", "bundle")
    return folder


def fingerprint(path: Path) -> str:
    """What changes when the bundle at `path` does: names, sizes and times of its files. Never raises.

    Cheaper than hashing the bundle, and unlike its digest it tells a folder still being written from one that is done.
    """
    try:
        folder = _follow(path)[0] if path.is_file() else path
        files = [(str(file.relative_to(folder)), file.stat()) for file in sorted(folder.rglob("*"))]
        seen: object = [str(folder), *((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files)]
    except (OSError, ValueError, BundleRejected) as error:
        seen = str(error)
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _follow(path: Path) -> tuple[Path, str | None]:
    """The folder that a file names, and the digest when it names that too."""
    with path.open("rb") as stream:
        data = stream.read(_MAX_POINTER_BYTES + 1)
    text = data.decode("utf-8").strip()
    if len(data) > _MAX_POINTER_BYTES or not text:
        raise BundleRejected(f"{path} names no bundle: it is empty or longer than {_MAX_POINTER_BYTES} bytes")
    if not text.startswith("{"):
        if "\n" in text:
            raise BundleRejected(f"{path} names no bundle: it has several lines")
        return path.parent / text, None
    record = json.loads(text)
    if record.get("digest", "") is None:
        raise BundleRejected(f"{path} points at no bundle any more")
    model, digest = str(record.get("model")), str(record.get("digest"))
    if not is_name(model) or not is_digest(digest):
        raise BundleRejected(f"{path} is not a channel of a registry: it needs a model and a digest")
    return path.resolve().parents[2] / "models" / model / digest, digest  # <registry>/channels/<model>/<channel>.json
