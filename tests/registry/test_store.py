"""The folder store: publishing is all or nothing, whatever dies, fills up or races."""

import fcntl
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.channel import read_channel
from registry.client import pull, push, verify_stored
from registry.errors import BundleIncomplete, BundleNotFound, DigestMismatch, ReferenceInvalid, StoreFull
from registry.manifest import (
    digest_of,
    payload_checksum,
    read_manifest,
    scan_files,
    verify_bundle,
    write_manifest,
)
from registry.moves import move_channel
from registry.staging import staged_folder
from registry.store import FolderStore
from tests.bundles import make_bundle
from tests.disks import mounted_disk
from tests.registry.damage import flip_byte

REPOSITORY = Path(__file__).parents[2]
# Pushes, says so after the first chunk and goes on when told to.
SLOW_PUSHER = """
import sys
from pathlib import Path
from registry.client import push
from registry.store import FolderStore
def wait(done, total):
    print(done, flush=True)
    sys.stdin.readline()
print(push(Path(sys.argv[1]), FolderStore(Path(sys.argv[2])), wait), flush=True)
"""


@pytest.fixture
def slow_push(store: FolderStore) -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Start a process that pushes a bundle into `store` and return it when it is in mid-copy."""
    started: list[subprocess.Popen] = []

    def start(bundle: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_PUSHER, str(bundle), str(store)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert int(process.stdout.readline()) > 0
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 96 KiB."""
    with mounted_disk(tmp_path / "disk", 96) as place:
        yield place


def leftovers(store: FolderStore) -> list[str]:
    return sorted(path.name for path in store.root.glob(".push-*"))


def test_pushed_bundle_is_complete_and_listed(bundle: Path, store: FolderStore) -> None:
    digest = push(bundle, store)
    assert digest == digest_of(bundle)
    assert (store.list_models(), store.list_digests("tiny")) == (["tiny"], [digest])
    stored = store.root / "models" / "tiny" / digest
    assert verify_bundle(stored, digest) == read_manifest(bundle)
    assert sorted(store.list_files("tiny", digest)) == sorted(path.name for path in bundle.iterdir())
    assert leftovers(store) == []


def test_pushed_bundle_is_readable_by_whom_the_umask_allows(bundle: Path, store: FolderStore) -> None:
    umask = os.umask(0o022)
    try:
        digest = push(bundle, store)
    finally:
        os.umask(umask)
    stored = store.root / "models" / "tiny" / digest
    assert stored.stat().st_mode & 0o777 == 0o755
    assert (stored / "model.onnx").stat().st_mode & 0o777 == 0o644


def test_pushing_again_changes_nothing(bundle: Path, store: FolderStore) -> None:
    digest = push(bundle, store)
    stored = store.root / "models" / "tiny" / digest / "model.onnx"
    before = stored.stat()
    reports: list[int] = []
    assert push(bundle, store, lambda done, total: reports.append(done)) == digest
    assert (stored.stat().st_ino, stored.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert reports == []


def test_push_keeps_files_in_folders(tmp_path: Path, store: FolderStore, bundles: list[Path]) -> None:
    source = shutil.copytree(bundles[0], tmp_path / "nested")
    (source / "reports" / "deep").mkdir(parents=True)
    (source / "reports" / "deep" / "quality.json").write_text("{}")
    rewrite_manifest(source)
    digest = push(source, store)
    with store.open_file("tiny", digest, "reports/deep/quality.json") as stream:
        assert stream.read() == b"{}"


def test_push_flushes_everything_before_it_is_visible(
    bundle: Path, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, flushed = os.fsync, {True: set(), False: set()}

    def record(descriptor: int) -> None:
        visible = bool(store.list_models())
        flushed[visible].add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    push(bundle, store)
    assert flushed[False] >= {path.name for path in bundle.iterdir()} | {"models", "registry"}
    assert any(name.startswith(".push-") for name in flushed[False]), "the staged folder's own entries"
    assert flushed[True] == {"tiny"}, "the rename"


def test_push_and_pull_need_little_memory(bundle: Path, store: FolderStore, tmp_path: Path) -> None:
    with (bundle / "golden.npz").open("r+b") as stream:
        stream.truncate(64 << 20)
    rewrite_manifest(bundle)
    tracemalloc.start()
    pull(store, "tiny", push(bundle, store), tmp_path / "target")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 << 20


def rewrite_manifest(bundle: Path) -> None:
    """Make the manifest list the files as they lie there."""
    files = scan_files(bundle)
    update = {"files": files, "checksum": payload_checksum(files)}
    write_manifest(bundle, read_manifest(bundle).model_copy(update=update))


def test_empty_store_lists_nothing_and_makes_no_folder(store: FolderStore) -> None:
    assert store.list_models() == store.list_digests("tiny") == []
    assert store.read_record("channels/tiny/production.json") is None
    assert not store.root.exists()


def test_push_notices_a_file_that_changes_while_it_is_copied(bundle: Path, store: FolderStore) -> None:
    def damage(done: int, total: int) -> None:
        if done < total / 2:
            return
        for name in ("model.onnx", "tokenizer.json", "manifest.json"):
            flip_byte(bundle / name)

    with pytest.raises(DigestMismatch, match="the manifest says"):
        push(bundle, store, damage)
    assert store.list_models() == []
    assert leftovers(store) == []


def test_push_stops_at_a_file_that_grew(bundle: Path, store: FolderStore) -> None:
    contents, digest = read_manifest(bundle), digest_of(bundle)
    os.truncate(bundle / "golden.npz", 50 << 20)
    copied: list[int] = []
    with pytest.raises(DigestMismatch, match=r"golden\.npz"):
        store.put_bundle(bundle, digest, contents, lambda done, total: copied.append(done))
    assert max(copied) <= 2 << 20


def test_push_loses_a_race_for_the_same_digest_gladly(bundle: Path, store: FolderStore) -> None:
    inner: list[str] = []

    def overtake(done: int, total: int) -> None:
        if not inner:
            inner.append(push(bundle, store))

    assert push(bundle, store, overtake) == inner[0]
    assert store.list_digests("tiny") == inner
    assert verify_stored(store, "tiny", inner[0])
    assert leftovers(store) == []


def test_killed_push_leaves_nothing_visible_and_the_next_push_cleans_up(
    bundle: Path, store: FolderStore, slow_push: Callable[[Path], subprocess.Popen]
) -> None:
    process = slow_push(bundle)
    process.kill()
    process.wait()
    assert store.list_models() == []
    assert len(leftovers(store)) == 2, "a folder and its lock: else this test shows nothing"
    digest = push(bundle, store)
    assert leftovers(store) == []
    assert verify_stored(store, "tiny", digest)


def test_push_leaves_a_living_pusher_alone(
    bundles: list[Path], store: FolderStore, slow_push: Callable[[Path], subprocess.Popen]
) -> None:
    process = slow_push(bundles[0])
    busy = leftovers(store)
    second = push(bundles[1], store)
    assert leftovers(store) == busy
    assert store.list_digests("tiny") == [second]
    output, _ = process.communicate("\n" * 100)
    first = output.split()[-1]
    assert process.returncode == 0
    assert store.list_digests("tiny") == sorted([first, second])
    assert verify_stored(store, "tiny", first)
    assert leftovers(store) == []


def test_interrupted_push_cleans_up_after_itself(bundle: Path, store: FolderStore) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(bundle, store, interrupt)
    assert store.list_models() == []
    assert leftovers(store) == []


def test_staging_retries_when_its_lock_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.flock, []

    def lose_once(descriptor: int, operation: int) -> None:
        if not calls:
            next(tmp_path.glob("*.lock")).unlink()  # what a cleaner does between our open and our lock
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lose_once)
    with staged_folder(tmp_path, "push") as folder:
        assert folder.is_dir()
        assert folder.with_suffix(".lock").exists()
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_full_disk_publishes_nothing_and_says_what_was_needed(small_disk: Path, tmp_path: Path, bundle: Path) -> None:
    store = FolderStore(small_disk / "registry")
    make_bundle(tmp_path / "big", name="big", dimension=4096)
    needed = sum(path.stat().st_size for path in (tmp_path / "big").iterdir())
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(StoreFull, match=f"{store} is full: {needed} bytes needed, {free} bytes free"):
        push(tmp_path / "big", store)
    assert store.list_models() == []
    assert leftovers(store) == []
    assert not (store.root / "models").exists()
    assert verify_stored(store, "tiny", push(bundle, store))


def test_full_disk_pulls_nothing(small_disk: Path, tmp_path: Path, store: FolderStore) -> None:
    digest = make_bundle(tmp_path / "big", name="big", dimension=4096)
    push(tmp_path / "big", store)
    with pytest.raises(StoreFull, match=f"{small_disk / 'target'} is full"):
        pull(store, "big", digest, small_disk / "target")
    assert list(small_disk.iterdir()) == []


def test_full_disk_leaves_a_channel_where_it_was(small_disk: Path, bundles: list[Path]) -> None:
    store = FolderStore(small_disk / "registry")
    first, second = (push(bundle, store) for bundle in bundles[:2])
    before = move_channel(store, "tiny", "production", first, None, moved_by="ann")
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(b"x" * (96 << 10))
    with pytest.raises(StoreFull):
        move_channel(store, "tiny", "production", second, first, moved_by="ann")
    assert read_channel(store, "tiny", "production") == before
    assert [path.name for path in (store.root / "channels" / "tiny").iterdir()] == ["production.json"]


def test_other_system_errors_pass_through(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        push(bundle, FolderStore(tmp_path / "file"))


@pytest.mark.parametrize("model", ["../models", "", "a/b", ".", "..", ".push-0"])
def test_store_refuses_models_that_are_no_names(store: FolderStore, model: str) -> None:
    with pytest.raises(ReferenceInvalid, match="is not a model name"):
        store.list_digests(model)


@pytest.mark.parametrize("digest", ["", "..", "../../secret", "0" * 63, "G" * 64])
def test_store_refuses_digests_that_are_none(store: FolderStore, digest: str) -> None:
    with pytest.raises(ReferenceInvalid, match="is not a digest"):
        store.open_file("tiny", digest, "manifest.json")


@pytest.mark.parametrize("key", ["", "top.json", "models/tiny/x.json", "a//b", "../a/b", "a/../b", "/a/b", "a/.lock"])
def test_store_refuses_keys_that_leave_the_records(store: FolderStore, key: str) -> None:
    with pytest.raises(ReferenceInvalid, match="is not the key of a record"):
        store.swap_record(key, None, b"{}")
    assert not store.root.exists()


def test_store_names_what_it_lacks(bundle: Path, store: FolderStore) -> None:
    digest = push(bundle, store)
    with pytest.raises(BundleNotFound, match="0" * 64):
        store.list_files("tiny", "0" * 64)
    with pytest.raises(BundleIncomplete, match=r"nothing\.bin of tiny"):
        store.open_file("tiny", digest, "nothing.bin")


def test_record_swaps_only_from_what_was_seen(store: FolderStore) -> None:
    key = "channels/tiny/production.json"
    assert not store.swap_record(key, b"seen", b"1")
    assert store.read_record(key) is None
    assert store.swap_record(key, None, b"1")
    assert not store.swap_record(key, None, b"2")
    assert not store.swap_record(key, b"0", b"2")
    assert store.read_record(key) == b"1"
    assert store.swap_record(key, b"1", b"2")
    assert store.read_record(key) == b"2"
