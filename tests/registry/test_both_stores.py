"""What every store keeps, the folder's and the bucket's: one suite for both."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from registry.channel import EmptiedRecord, read_channel, read_channels, see_channel, swap_channel
from registry.client import pull, push, verify_stored
from registry.collect import collect
from registry.errors import (
    BundleIncomplete,
    BundleNotFound,
    BundleTooLarge,
    ChannelMoved,
    ChannelNotFound,
    DigestMismatch,
    ManifestInvalid,
    ReferenceInvalid,
    RegistryError,
    RollbackRefused,
    SignatureInvalid,
    SignatureMissing,
)
from registry.events import Collected, Refused
from registry.fsck import check_registry
from registry.ledger import append, as_move, read_ledger, verify_ledger
from registry.manifest import read_manifest, verify_bundle
from registry.moves import move_channel
from registry.promotion import rollback, status
from registry.signing import make_keys
from registry.store import Store
from tests.registry.damage import edit_manifest, flip_byte


def test_bundle_comes_back_as_it_went(any_store: Store, bundles: list[Path], tmp_path: Path) -> None:
    assert any_store.list_models() == any_store.list_digests("tiny") == []
    progress: list[tuple[int, int]] = []
    digests = [push(bundle, any_store, lambda done, total: progress.append((done, total))) for bundle in bundles]
    assert progress[-1][0] == progress[-1][1] > 0
    assert (any_store.list_models(), any_store.list_digests("tiny")) == (["tiny"], sorted(digests))
    assert any_store.list_files("tiny", digests[0]) == sorted(path.name for path in bundles[0].iterdir())
    assert pull(any_store, "tiny", digests[0][:8], tmp_path / "back") == read_manifest(bundles[0])
    assert verify_bundle(tmp_path / "back", digests[0])
    age = datetime.now(UTC) - any_store.list_published("tiny")[digests[0]]
    assert timedelta(seconds=-5) < age < timedelta(minutes=10)
    progress.clear()
    assert push(bundles[0], any_store, lambda done, total: progress.append((done, total))) == digests[0]
    assert progress == []


def test_names_that_name_nothing_are_refused(any_store: Store, bundle: Path) -> None:
    digest = push(bundle, any_store)
    assert not any_store.has_bundle("tiny", "0" * 64)
    with pytest.raises(BundleNotFound, match="0" * 64):
        any_store.open_file("tiny", "0" * 64, "manifest.json")
    with pytest.raises(BundleNotFound):
        any_store.list_files("tiny", "0" * 64)
    with pytest.raises(BundleIncomplete, match=r"nothing\.bin of tiny"):
        any_store.open_file("tiny", digest, "nothing.bin")
    with pytest.raises(ReferenceInvalid, match="is not a model name"):
        any_store.list_digests("../tiny")
    for key in ("top", "models/tiny/x", "index/tiny/x", "../a/b"):
        with pytest.raises(ReferenceInvalid, match="is not the key of a record"):
            any_store.swap_record(key, None, b"")


def test_record_swaps_only_from_what_was_seen(any_store: Store) -> None:
    key = "channels/tiny/production.json"
    assert not any_store.swap_record(key, b"seen", b"1")
    assert any_store.read_record(key) is None
    assert any_store.swap_record(key, None, b"1")
    assert not any_store.swap_record(key, None, b"2")
    assert not any_store.swap_record(key, b"0", b"2")
    assert any_store.read_record(key) == b"1"
    assert any_store.swap_record(key, b"1", b"2")
    assert any_store.read_record(key) == b"2"


def test_deleted_bundle_is_gone_and_can_come_again(any_store: Store, bundle: Path) -> None:
    digest = push(bundle, any_store)
    any_store.delete_bundle("tiny", digest)
    any_store.delete_bundle("tiny", digest)
    assert (any_store.list_models(), any_store.has_bundle("tiny", digest)) == ([], False)
    assert push(bundle, any_store) == digest
    assert verify_stored(any_store, "tiny", digest)


def test_channel_moves_in_one_line(any_store: Store, bundles: list[Path]) -> None:
    first, second = (push(bundle, any_store) for bundle in bundles[:2])
    move_channel(any_store, "tiny", "production", first, None, moved_by="ann")
    with pytest.raises(ChannelMoved, match=rf"points at {first} \(move 1 by ann\)"):
        move_channel(any_store, "tiny", "production", second, None, moved_by="bob")
    move_channel(any_store, "tiny", "production", second, first, moved_by="bob")
    assert read_channel(any_store, "tiny", "production").previous == first
    assert [entry.event.kind for entry in read_ledger(any_store, "tiny")] == ["set", "set"]
    assert list(check_registry(any_store)) == []


def test_channel_that_is_emptied_is_as_if_it_was_never_set(any_store: Store, bundles: list[Path]) -> None:
    first, second = (push(bundle, any_store) for bundle in bundles[:2])
    move_channel(any_store, "tiny", "production", first, None, moved_by="ann")
    overtaken = see_channel(any_store, "tiny", "production")
    with pytest.raises(RollbackRefused, match="replaced nothing"):
        rollback(any_store, "tiny", asked_by="eve")
    with pytest.raises(ChannelMoved, match=f"points at {first}"):
        rollback(any_store, "tiny", asked_by="eve", expected=second, may_empty=True)
    for _ in range(2):
        entry = rollback(any_store, "tiny", asked_by="eve", expected=first, may_empty=True)
        assert (as_move(entry).bundle, as_move(entry).replaced, as_move(entry).number) == (None, first, 2)
    with pytest.raises(ChannelNotFound):
        read_channel(any_store, "tiny", "production")
    assert (read_channels(any_store, "tiny"), status(any_store, "tiny")) == ([], None)
    assert list(check_registry(any_store)) == []
    # A mover that saw the channel before it was emptied, or before it was first set, brings nothing back.
    assert overtaken.record is not None
    for seen in (overtaken.data, None):
        assert not swap_channel(any_store, overtaken.record, seen)
    with pytest.raises(ChannelMoved, match=f"was never set, expected {first}"):
        move_channel(any_store, "tiny", "production", second, first, moved_by="ann")
    record = move_channel(any_store, "tiny", "production", second, None, moved_by="ann")
    assert (record.previous, record.sequence) == (None, 3)
    assert list(check_registry(any_store)) == []


def test_emptied_channel_that_the_ledger_does_not_know_is_a_fault(any_store: Store, bundle: Path) -> None:
    digest = push(bundle, any_store)
    move_channel(any_store, "tiny", "production", digest, None, moved_by="ann")
    seen = see_channel(any_store, "tiny", "production")
    assert seen.record is not None
    forged = EmptiedRecord(**{**seen.record.model_dump(), "digest": None, "sequence": 2})
    assert swap_channel(any_store, forged, seen.data)
    (fault,) = check_registry(any_store)
    assert fault.reason == f"points at nothing by move 2, the ledger says {digest} by move 1 of ann"


def test_what_is_no_bundle_is_refused_and_recorded(
    any_store: Store, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = shutil.copytree(bundle, tmp_path / "good")
    (bundle / "link").symlink_to(bundle / "model.onnx")
    wrongs: list[tuple[Path, type[RegistryError], dict[str, str]]] = [(bundle, BundleIncomplete, {})]
    reaching = shutil.copytree(good, tmp_path / "reaching")
    edit_manifest(reaching, lambda document: document["files"].update({"../secret": document["files"]["golden.npz"]}))
    changed = shutil.copytree(good, tmp_path / "changed")
    flip_byte(changed / "model.onnx")
    make_keys(tmp_path / "release.pem", tmp_path / "release.pub")
    unsigned, limit = {"THORFORGE_PUBLIC_KEY": str(tmp_path / "release.pub")}, {"THORFORGE_MAX_BUNDLE_BYTES": "100"}
    wrongs += [
        (reaching, ManifestInvalid, {}),
        (changed, DigestMismatch, {}),
        (good, SignatureMissing, unsigned),
        (good, BundleTooLarge, limit),
    ]
    for folder, error, variables in wrongs:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(error):
                push(folder, any_store)
    assert any_store.list_models() == []
    events = [entry.event for entry in read_ledger(any_store, "tiny")][::-1]
    assert all(isinstance(event, Refused) and event.action == "push" for event in events)
    assert [event.error for event in events if isinstance(event, Refused)] == [error.__name__ for _, error, _ in wrongs]


def test_signature_is_asked_for_where_a_public_key_is_configured(
    any_store: Store, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = push(bundle, any_store)
    keys = {name: (tmp_path / f"{name}.pem", tmp_path / f"{name}.pub") for name in ("ours", "theirs")}
    for pair in keys.values():
        make_keys(*pair)
    assert keys["ours"][0].stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("THORFORGE_PUBLIC_KEY", str(keys["ours"][1]))
    for refused in (
        lambda: push(bundle, any_store),
        lambda: pull(any_store, "tiny", digest, tmp_path / "unsigned"),
        lambda: verify_stored(any_store, "tiny", digest),
    ):
        with pytest.raises(SignatureMissing, match="is not signed"):
            refused()
    assert [fault.subject for fault in check_registry(any_store)] == [digest]
    monkeypatch.setenv("THORFORGE_SIGNING_KEY", str(keys["theirs"][0]))
    with pytest.raises(SignatureInvalid, match=r"by no key of .*ours\.pub"):
        push(bundle, any_store)
    monkeypatch.setenv("THORFORGE_SIGNING_KEY", str(keys["ours"][0]))
    push(bundle, any_store)
    pull(any_store, "tiny", digest, tmp_path / "signed")
    assert verify_bundle(tmp_path / "signed", digest, keys["ours"][1])
    with pytest.raises(SignatureInvalid):
        verify_bundle(tmp_path / "signed", digest, keys["theirs"][1])
    with pytest.raises(SignatureInvalid, match="has another signature already"):
        any_store.put_signature("tiny", digest, b"x")
    assert list(check_registry(any_store)) == []


def test_collection_keeps_what_is_needed(any_store: Store, bundles: list[Path]) -> None:
    digests = [push(bundle, any_store) for bundle in bundles]
    later = datetime.now(UTC) + timedelta(days=8)
    assert collect(any_store, "tiny", collected_by="ann").deleted == ()
    move_channel(any_store, "tiny", "production", digests[0], None, moved_by="ann")
    move_channel(any_store, "tiny", "production", digests[1], digests[0], moved_by="ann")
    planned = collect(any_store, "tiny", collected_by="ann", now=later, dry_run=True)
    assert (planned.deleted, planned.num_kept) == ((digests[2],), 2)
    assert any_store.has_bundle("tiny", digests[2])
    assert collect(any_store, "tiny", collected_by="ann", now=later) == planned
    assert any_store.list_digests("tiny") == sorted(digests[:2])
    newest = next(read_ledger(any_store, "tiny")).event
    assert newest == Collected(bundles=(digests[2],), collected_by="ann")
    assert list(check_registry(any_store)) == []


def test_bundle_being_collected_cannot_be_promoted(any_store: Store, bundle: Path) -> None:
    digest = push(bundle, any_store)
    append(any_store, "tiny", Collected(bundles=(digest,), collected_by="ann"), now=datetime.now(UTC) + timedelta(1))
    with pytest.raises(BundleNotFound):
        move_channel(any_store, "tiny", "production", digest, None, moved_by="bob")
    assert verify_ledger(any_store, "tiny") == 1


def test_fsck_finds_what_was_changed_behind_its_back(any_store: Store, bundles: list[Path]) -> None:
    first, second = (push(bundle, any_store) for bundle in bundles[:2])
    move_channel(any_store, "tiny", "production", first, None, moved_by="ann")
    move_channel(any_store, "tiny", "production", second, first, moved_by="ann")
    key = "channels/tiny/production.json"
    record = any_store.read_record(key)
    assert record is not None
    forged = json.dumps({**json.loads(record), "digest": first}).encode()
    assert any_store.swap_record(key, record, forged)
    (fault,) = check_registry(any_store)
    assert (fault.subject, f"the ledger says {second}" in fault.reason) == ("production", True)
    assert any_store.swap_record(key, forged, record)
    entry_key = "ledger/tiny/00000001.json"
    entry = any_store.read_record(entry_key)
    assert entry is not None
    assert any_store.swap_record(entry_key, entry, entry.replace(b'"moved_by": "ann"', b'"moved_by": "eve"'))
    (fault,) = check_registry(any_store)
    assert "entry 2 of tiny" in fault.reason
    assert "does not follow entry 1 as it is now" in fault.reason
