"""The bucket's store when the line to it breaks: whole, verified and resumed, or a clear error."""

import hashlib
import os
import threading
import tracemalloc
from datetime import timedelta
from pathlib import Path

import pytest

from registry import transfer
from registry.client import pull, push, verify_stored
from registry.errors import (
    BundleIncomplete,
    BundleNotFound,
    DigestMismatch,
    ReferenceInvalid,
    StoreFull,
    StoreUnavailable,
)
from registry.manifest import FileEntry, payload_checksum, read_manifest, scan_files, verify_bundle, write_manifest
from registry.s3_store import S3Store
from registry.store import Bucket, FolderStore, open_store
from tests.registry.s3 import (
    ENDPOINT_VARIABLE,
    Exchange,
    Proxy,
    change_byte,
    cut_at_once,
    cut_body,
    lose_answer,
    server_error,
)

# S3 itself wants 5 MiB of every part but the last.
PART = 5 << 20 if ENDPOINT_VARIABLE in os.environ else 64 << 10


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", PART)


@pytest.fixture
def large(bundle: Path) -> Path:
    """A bundle one of whose files takes six parts."""
    (bundle / "golden.npz").write_bytes(os.urandom(5 * PART + 1000))
    rewrite_manifest(bundle)
    return bundle


def rewrite_manifest(bundle: Path) -> None:
    """Make the manifest list the files as they lie there."""
    files = scan_files(bundle)
    update = {"files": files, "checksum": payload_checksum(files)}
    write_manifest(bundle, read_manifest(bundle).model_copy(update=update))


def test_large_file_goes_and_comes_in_parts(broken_store: S3Store, proxy: Proxy, large: Path, tmp_path: Path) -> None:
    progress: list[int] = []
    digest = push(large, broken_store, lambda done, total: progress.append(done))
    assert progress == sorted(set(progress))
    assert progress[-1] == sum(path.stat().st_size for path in large.iterdir())
    assert proxy.count(r"^PUT .*golden\.npz\?.*partNumber") == 6
    proxy.seen.clear()
    pull(broken_store, "tiny", digest, tmp_path / "back")
    assert proxy.count(r"^GET .*golden\.npz") == 6
    assert verify_bundle(tmp_path / "back", digest)


def test_push_that_broke_off_sends_only_what_is_missing(
    broken_store: S3Store, proxy: Proxy, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.strike(r"^PUT .*golden\.npz\?.*partNumber=[45]", server_error, times=10**6)
    with pytest.raises(StoreUnavailable, match=r"does not answer, tried 8 times"):
        push(large, broken_store)
    assert broken_store.list_models() == []
    before = proxy.count(r"^PUT .*golden\.npz\?.*partNumber=[1236]")
    proxy.faults.clear()
    proxy.seen.clear()
    digest = push(large, broken_store)
    assert proxy.count(r"^PUT .*golden\.npz\?.*partNumber") == 6 - before < 6
    assert verify_stored(broken_store, "tiny", digest)


def test_push_survives_errors_cuts_and_lost_answers(broken_store: S3Store, proxy: Proxy, large: Path) -> None:
    proxy.strike(r"^PUT .*partNumber=1", cut_at_once)
    proxy.strike(r"^PUT .*partNumber=2", server_error, times=2)
    proxy.strike(r"^PUT .*partNumber=3", lose_answer)
    proxy.strike(r"^POST .*uploads", server_error)
    proxy.strike(r"^POST .*uploadId", lose_answer)
    proxy.strike(r"^PUT .*model\.onnx", lose_answer)
    proxy.strike(r"^PUT .*manifest\.json", cut_at_once)
    proxy.strike(r"^PUT .*/index/", lose_answer)
    digest = push(large, broken_store)
    assert all(times == 0 for _, times, _ in proxy.faults)
    assert verify_stored(broken_store, "tiny", digest)


def test_pull_goes_on_where_the_body_broke(broken_store: S3Store, proxy: Proxy, large: Path, tmp_path: Path) -> None:
    digest = push(large, broken_store)
    proxy.strike(r"^GET .*golden\.npz", cut_body, times=3)
    proxy.strike(r"^GET .*manifest\.json", cut_body)
    proxy.strike(r"^GET .*model\.onnx", server_error)
    pull(broken_store, "tiny", digest, tmp_path / "back")
    assert verify_bundle(tmp_path / "back", digest)
    assert all(times == 0 for _, times, _ in proxy.faults)


def test_slow_body_is_broken(s3_place: str, s3_store: S3Store, proxy: Proxy, bundle: Path, tmp_path: Path) -> None:
    digest, done = push(bundle, s3_store), threading.Event()

    def stall(exchange: Exchange) -> None:
        status, headers, body = exchange.forward()
        exchange.answer(status, headers, body, num_sent=10)
        done.wait()

    proxy.strike(r"^GET .*model\.onnx", stall)
    place = s3_place.partition("endpoint=")[0] + f"endpoint={proxy.url}"
    impatient = S3Store(Bucket(place, pause_seconds=0, timeout_seconds=0.5))
    pull(impatient, "tiny", digest, tmp_path / "back")
    done.set()
    assert proxy.count(r"^GET .*model\.onnx") >= 2
    assert verify_bundle(tmp_path / "back", digest)


def test_changed_byte_is_noticed(broken_store: S3Store, proxy: Proxy, large: Path, tmp_path: Path) -> None:
    digest = push(large, broken_store)
    for name in ("golden.npz", "model.onnx", "manifest.json"):
        proxy.strike(rf"^GET .*{name}", change_byte)
        with pytest.raises(DigestMismatch, match=name.replace(".", r"\.")):
            pull(broken_store, "tiny", digest, tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_missing_part_is_named(s3_store: S3Store, large: Path, tmp_path: Path) -> None:
    digest = push(large, s3_store)
    s3_store.bucket.delete(f"models/tiny/{digest}/model.onnx")
    with pytest.raises(BundleIncomplete, match=r"missing \['model\.onnx'\]"):
        pull(s3_store, "tiny", digest, tmp_path / "back")


def test_file_that_changes_under_its_reader_is_refused(s3_store: S3Store, large: Path) -> None:
    digest = push(large, s3_store)
    key = f"models/tiny/{digest}/golden.npz"
    with s3_store.open_file("tiny", digest, "golden.npz") as stream:
        s3_store.bucket.delete(key)
        assert s3_store.bucket.put(key, os.urandom(6 * PART))
        with pytest.raises(BundleIncomplete, match="was changed or deleted while it was read"):
            stream.read()


def test_other_file_under_our_key_is_not_taken_for_ours(s3_store: S3Store, large: Path, bundles: list[Path]) -> None:
    digest = hashlib.sha256((large / "manifest.json").read_bytes()).hexdigest()
    assert s3_store.bucket.put(f"models/tiny/{digest}/golden.npz", b"something else")
    with pytest.raises(DigestMismatch, match=r"golden\.npz in s3://.* is another file \(14 bytes"):
        push(large, s3_store)
    assert s3_store.list_models() == []


def test_file_that_changes_while_it_is_sent_is_not_kept(s3_store: S3Store, large: Path) -> None:
    wrong = FileEntry(sha256="0" * 64, size=(large / "golden.npz").stat().st_size)
    with pytest.raises(DigestMismatch, match=r"golden\.npz has digest"):
        transfer.upload_file(s3_store.bucket, "models/x", large / "golden.npz", wrong, lambda num_bytes: None)
    assert s3_store.bucket.list_uploads("models/") == []
    assert s3_store.bucket.head("models/x") is None


def test_stale_etag_loses_and_lost_answer_wins(broken_store: S3Store, proxy: Proxy) -> None:
    key = "channels/tiny/production.json"
    assert broken_store.swap_record(key, None, b"1")

    def overtake(exchange: Exchange) -> None:
        other = S3Store(broken_store.bucket)
        assert other.swap_record(key, b"1", b"theirs")
        exchange.answer(*exchange.forward())

    proxy.strike(r"^PUT .*production", overtake)
    assert not broken_store.swap_record(key, b"1", b"ours")
    assert broken_store.read_record(key) == b"theirs"
    proxy.strike(r"^PUT .*production", lose_answer)
    assert broken_store.swap_record(key, b"theirs", b"ours")
    assert broken_store.read_record(key) == b"ours"


def test_refusals_of_the_server_are_ours(broken_store: S3Store, proxy: Proxy, s3_place: str) -> None:
    def deny(exchange: Exchange) -> None:
        exchange.answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>not yours</Message></Error>")

    def fill(exchange: Exchange) -> None:
        exchange.answer(507, {}, b"<Error><Code>XMinioStorageFull</Code></Error>")

    proxy.strike("^GET", deny)
    with pytest.raises(StoreUnavailable, match=r"refuses a/b: .*AccessDenied"):
        broken_store.read_record("a/b")
    proxy.strike("^PUT", fill)
    with pytest.raises(StoreFull, match="XMinioStorageFull"):
        broken_store.swap_record("a/b", None, b"")
    nowhere = S3Store(s3_place.replace("s3://", "s3://no-"))
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        nowhere.list_models()


def test_leftovers_of_dead_pushes_are_removed(broken_store: S3Store, proxy: Proxy, large: Path) -> None:
    proxy.strike(r"^PUT .*golden\.npz\?.*partNumber=4", server_error, times=10**6)
    with pytest.raises(StoreUnavailable):
        push(large, broken_store)
    orphan = f"models/tiny/{'1' * 64}/model.onnx"
    assert broken_store.bucket.put(orphan, b"x")
    broken_store.delete_leftovers(timedelta(days=1))  # moto dates every upload to 2010, so that one goes here
    assert broken_store.bucket.head(orphan) is not None
    assert broken_store.delete_leftovers(timedelta(seconds=-60)) >= 1
    assert [item.key for item in broken_store.bucket.list_keys("models/", is_flat=True)] == []
    assert broken_store.bucket.list_uploads("models/") == []


def test_push_and_pull_need_little_memory(
    s3_store: S3Store, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", max(PART, 1 << 20))
    os.truncate(bundle / "golden.npz", 32 << 20)
    rewrite_manifest(bundle)
    tracemalloc.start()
    pull(s3_store, "tiny", push(bundle, s3_store), tmp_path / "target")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < max(20 << 20, 6 * transfer.PART_BYTES)  # four parts at a time


def test_empty_object_and_empty_file(s3_store: S3Store) -> None:
    assert s3_store.swap_record("a/b", None, b"")
    assert s3_store.read_record("a/b") == b""


@pytest.mark.parametrize("place", ["http://host/x", "s3://", "s3:///x", "s3://b/x?region=y", "s3://b/x#y"])
def test_urls_that_name_no_registry_are_refused(place: str) -> None:
    with pytest.raises(ReferenceInvalid, match="is no registry"):
        open_store(place)


def test_places_open_the_right_store(tmp_path: Path, s3_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store(tmp_path), FolderStore)
    assert isinstance(open_store(str(tmp_path)), FolderStore)
    monkeypatch.setenv("THORFORGE_REGISTRY", s3_place)
    store = open_store()
    assert isinstance(store, S3Store)
    with pytest.raises(BundleNotFound):
        store.list_files("tiny", "0" * 64)
