"""Models in an S3 bucket: what lies below a URL, downloaded once for each content."""

import hashlib
import shutil
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from registry.errors import RegistryError
from registry.staging import needs_room, rename_folder, staged_folder
from registry.store import Bucket, Head
from registry.transfer import open_object
from tasks.errors import TeacherRejected
from tasks.progress import progress
from tasks.state import state_dir

# No code and no pickle is fetched: only what a model folder is made of.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_MB = 1 << 20


def fetch_model(url: str) -> Path:
    """The model folder below `s3://bucket/prefix[?endpoint=URL]`, in the state folder.

    Endpoint and keys are found as the registry's are. Raises TeacherRejected, StoreFull.
    """
    try:
        bucket = Bucket(url)
        found = _list_files(bucket)
        if not found:
            raise TeacherRejected(f"model {bucket} holds none of {', '.join(MODEL_FILES)}: give a model folder's URL")
        key = hashlib.sha256(repr([bucket.url, *((name, head.etag) for name, head in found.items())]).encode())
        folder = state_dir() / "models" / key.hexdigest()[:16]
        if not folder.is_dir():
            _download(bucket, found, folder)
    except RegistryError as error:
        raise TeacherRejected(f"model {url.partition('?')[0]} cannot be fetched: {error}") from None
    return folder.absolute()


def _list_files(bucket: Bucket) -> dict[str, Head]:
    """Size and ETag of every file of the model, by name, in order."""
    names = sorted(item.key for item in bucket.list_keys("", is_flat=True))
    wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in MODEL_FILES)]
    for name in wanted:
        if ".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name:
            raise TeacherRejected(f"model {bucket} has a file {name!r}, which leaves its folder")
    heads = {name: bucket.head(name) for name in wanted}
    return {name: head for name, head in heads.items() if head is not None}


def _download(bucket: Bucket, found: dict[str, Head], folder: Path) -> None:
    """All files, or none: a download that is killed leaves nothing that could be taken for a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    total = sum(head.size for head in found.values())
    with needs_room(folder.parent, total), staged_folder(folder.parent, "fetch") as work:
        with progress(f"fetch {bucket}", total) as advance:
            for name, head in found.items():
                target = work / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = open_object(bucket, name)
                if source is None:
                    raise TeacherRejected(f"model {bucket}: {name} was deleted while it was fetched")
                with source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream, _MB)
                advance(head.size)
                if target.stat().st_size != head.size:
                    raise TeacherRejected(f"model {bucket}: {name} was changed while it was fetched")
        rename_folder(work, folder)
