"""What tasks pass to one another: folders named by the digest of their content, and the cache policy built on that."""

import errno
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prefect.cache_policies import INPUTS, CachePolicy
from prefect.context import TaskRunContext
from pydantic import BaseModel, ConfigDict

from registry.manifest import hash_file, list_files, payload_checksum
from registry.staging import needs_room, rename_folder, staged_folder
from tasks.errors import ArtifactChanged, ArtifactMissing
from tasks.measurement.libraries import library_versions
from tasks.state import state_dir

OWN_PACKAGES = ("tasks", "serving", "registry")
_BLOCK_BYTES = 4096
_IMPORT = re.compile(r"^\s*from ([\w.]+) import (\([^)]*|.*)", re.MULTILINE)
_NOT_PYTHON = {".so", ".c", ".h", ".cu", ".cuh"}  # kernels, compiled or to be


class Artifact(BaseModel):
    """A finished, immutable folder: its place below the state folder and the digest of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    digest: str

    @property
    def folder(self) -> Path:
        """The folder itself. Raises ArtifactMissing when somebody deleted it."""
        folder = state_dir() / self.path
        if not folder.is_dir():
            raise ArtifactMissing(f"{folder} is gone, but a cached result names it: run again with --refresh")
        return folder

    def verify(self) -> Path:
        """The folder, every file of it hashed again. Raises ArtifactMissing, ArtifactChanged."""
        if _digest_of(self.folder) != self.digest:
            raise ArtifactChanged(f"files in {self.folder} were changed since it was made: run again with --refresh")
        return self.folder


class Draft:
    """An artifact being written: a hidden folder that becomes visible, complete, or not at all."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the hidden folder to write into."""
        self.folder = folder
        self._artifact: Artifact | None = None

    @property
    def artifact(self) -> Artifact:
        """The finished artifact; only after the `with` block."""
        assert self._artifact is not None, "artifact read before its draft was finished"
        return self._artifact

    def finish(self, kind: str) -> None:
        """Name the folder by its content and move it into place; an equal one that is there already wins."""
        digest = _digest_of(self.folder)
        self._artifact = Artifact(path=str(Path("artifacts") / f"{kind}-{digest[:16]}"), digest=digest)
        target = state_dir() / self._artifact.path
        if not rename_folder(self.folder, target) and _digest_of(target) != digest:
            with staged_folder(target.parent, "changed") as aside:
                target.rename(aside)
                rename_folder(self.folder, target)


@contextmanager
def draft(kind: str) -> Iterator[Draft]:
    """Write an artifact of `kind` into `draft.folder`; after the block `draft.artifact` names it.

    A crash in the middle leaves nothing that a later run could take for finished, and the next draft of the kind
    removes what a killed one left behind. Raises StoreFull.
    """
    root = state_dir() / "artifacts"
    with needs_room(root):
        root.mkdir(parents=True, exist_ok=True)
        with staged_folder(root, kind) as folder:
            work = Draft(folder)
            with _full_disk_noticed(folder):
                yield work
            work.finish(kind)


@contextmanager
def _full_disk_noticed(folder: Path) -> Iterator[None]:
    """A full disk is ENOSPC, however the block took it: libraries raise errors of their own, C++ streams none."""
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(folder).free < _BLOCK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    if shutil.disk_usage(folder).free < _BLOCK_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _digest_of(folder: Path) -> str:
    # Every file, a bundle's manifest too: the same engine made for another name or run is another artifact.
    return payload_checksum({name: hash_file(folder / name) for name in list_files(folder)})


@dataclass
class _CodeAndLibraries(CachePolicy):
    """What INPUTS cannot see: the task, its module, our code that it calls, and the libraries."""

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str:
        function = task_ctx.task.fn
        code = (function.__qualname__, _own_sources(function.__module__))
        return hashlib.sha256(f"{code}{sorted(library_versions().items())}".encode()).hexdigest()


def _own_sources(module: str) -> list[str]:
    """Source of `module` and of every module of ours that it imports, directly or not, at the top or in a function.

    Kernels that lie beside a module are part of what it does: their digests stand behind its source.
    """
    texts: dict[str, str] = {}
    todo = {module}
    while todo:
        name = todo.pop()
        if name not in texts:
            texts[name] = _source_of(name)
            todo |= _own_imports(texts[name])
    return [texts[name] for name in sorted(texts)]


@cache  # a process keeps running the code it has loaded, whatever an editor does to the file meanwhile
def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is imported by our own code"
    assert spec.origin is not None, f"{module} is a module with a file"
    path = Path(spec.origin)
    kernels = sorted(file for file in path.parent.iterdir() if file.suffix in _NOT_PYTHON)
    return path.read_text(encoding="utf-8") + "".join(f"# {file.name} {hash_file(file).sha256}\n" for file in kernels)


def _own_imports(source: str) -> set[str]:
    # Not by ast: in CPython 3.11 ast.parse fails now and then when another thread parses too, and tasks run in threads.
    found: set[str] = set()
    for module, names in _IMPORT.findall(source):
        if module.split(".")[0] in OWN_PACKAGES:
            found |= {module, *_modules_among(names, module)}
    return found


def _modules_among(names: str, package: str) -> set[str]:
    """Those of the imported names that are modules of `package`, not what its own file defines."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    words = re.findall(r"\w+", names)
    return {f"{package}.{word}" for word in words for folder in folders if (Path(folder) / f"{word}.py").is_file()}


# Results are reused across runs: Prefect's default policy adds the run's id and never hits. Its TASK_SOURCE is part of
# what CODE_AND_LIBRARIES hashes, but reads the file again at every call.
CODE_AND_LIBRARIES = _CodeAndLibraries()
CACHED = INPUTS + CODE_AND_LIBRARIES
