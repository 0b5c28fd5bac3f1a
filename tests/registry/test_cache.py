"""The cache of pulled bundles: bounded, and nothing in it goes while any process uses it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry.cache import evict, fetched
from registry.client import push
from registry.manifest import digest_of, verify_bundle
from registry.store import FolderStore, Store
from serving.models import load_model
from serving.settings import ModelSource

# Holds a bundle of a cache until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from registry.cache import fetched
from registry.store import FolderStore
with fetched(FolderStore(sys.argv[1]), "tiny", sys.argv[2], Path(sys.argv[3])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextmanager
def holder(store: Store, digest: str, cache: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses a bundle."""
    command = [sys.executable, "-c", HOLDER, str(store), digest, str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def fill(store: Store, bundles: list[Path], cache: Path) -> list[Path]:
    """Every bundle in the cache, asked for in this order."""
    folders = []
    for time, bundle in enumerate(bundles):
        with fetched(store, "tiny", push(bundle, store), cache) as folder:
            folders.append(folder)
        os.utime(folder.with_name(f".{folder.name}.lock"), (time, time))
    return folders


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bundle_is_copied_once_into_a_shared_cache(any_store: Store, bundle: Path, cache: Path) -> None:
    digest = push(bundle, any_store)
    with fetched(any_store, "tiny", digest[:8], cache) as folder:
        before = (folder / "model.onnx").stat().st_ino
    with fetched(any_store, "tiny", digest, cache) as again:
        assert again == folder
        assert ((again / "model.onnx").stat().st_ino, digest_of(again)) == (before, digest)


def test_eviction_begins_with_what_was_asked_for_longest_ago(
    store: FolderStore, bundles: list[Path], cache: Path
) -> None:
    first, second, third = fill(store, bundles, cache)
    with fetched(store, "tiny", first.name, cache):
        pass
    first.with_name(f"{first.name}.engine.json").write_text("{}")
    second.with_name(f"{second.name}.plans").mkdir()
    assert evict(cache, 3 * size_of(first) + 2) == []
    assert evict(cache, size_of(first) + size_of(third) + 2) == [second]
    assert sorted(path.name for path in first.parent.iterdir() if path.name[0] != ".") == sorted(
        (first.name, f"{first.name}.engine.json", third.name)
    )
    assert verify_bundle(first, first.name)


def test_what_is_in_use_is_not_evicted(store: FolderStore, bundles: list[Path], cache: Path) -> None:
    first, second, third = fill(store, bundles, cache)
    model = load_model(ModelSource(path=second))
    with holder(store, first.name, cache), fetched(store, "tiny", third.name, cache):
        assert evict(cache, 0) == []
    assert set(evict(cache, 0)) == {first, third}, "whoever dies holds nothing any more"
    assert model.reopen is not None
    model.reopen().close()
    model.engine.close()
    del model
    assert evict(cache, 0) == [second]


def test_evicted_bundle_is_copied_again(store: FolderStore, bundles: list[Path], cache: Path) -> None:
    (first,) = fill(store, bundles[:1], cache)
    assert evict(cache, 0) == [first]
    with fetched(store, "tiny", first.name, cache) as folder:
        assert verify_bundle(folder, first.name)


def test_folders_that_others_put_there_are_left_alone(store: FolderStore, bundles: list[Path], cache: Path) -> None:
    (first,) = fill(store, bundles[:1], cache)
    theirs = cache / "tiny" / ("0" * 64)
    theirs.mkdir()
    (theirs / "file").write_text("x")
    (cache / "start").mkdir()
    assert evict(cache, 0) == [first]
    assert (theirs / "file").exists()
    assert (cache / "start").exists()


def test_limit_of_the_settings_holds_after_every_copy(
    store: FolderStore,
    bundles: list[Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digests = [push(bundle, store) for bundle in bundles]
    monkeypatch.setenv("THORFORGE_CACHE_BYTES", "1")
    for digest in digests:
        with fetched(store, "tiny", digest, cache) as folder:
            assert [path.name for path in (cache / "tiny").iterdir() if path.name[0] != "."] == [digest]
            assert verify_bundle(folder, digest)
    assert "all of it in use" in caplog.text


RACER = """
import json, sys
from pathlib import Path
from registry.cache import fetched
from registry.manifest import verify_bundle
from registry.store import FolderStore
digests = json.loads(sys.argv[2])
for number in range(12):
    digest = digests[number % len(digests)]
    with fetched(FolderStore(sys.argv[1]), "tiny", digest, Path(sys.argv[3])) as folder:
        verify_bundle(folder, digest)
"""


def test_racing_processes_always_find_whole_bundles(store: FolderStore, bundles: list[Path], cache: Path) -> None:
    digests = [push(bundle, store) for bundle in bundles]
    environment = {**os.environ, "THORFORGE_CACHE_BYTES": "1"}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(store), json.dumps(digests[turn:] + digests[:turn]), str(cache)],
            env=environment,
        )
        for turn in range(3)
    ]
    assert [racer.wait(120) for racer in racers] == [0, 0, 0]
    assert len([path for path in (cache / "tiny").iterdir() if path.name[0] != "."]) <= 3
