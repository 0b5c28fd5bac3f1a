"""Push, pull, resolve, list and verify through a real folder store."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.client import list_bundles, pull, push, read_stored, resolve, verify_stored
from registry.errors import (
    AmbiguousDigest,
    BundleIncomplete,
    BundleNotFound,
    ChannelNotFound,
    DigestMismatch,
    ManifestInvalid,
    ReferenceInvalid,
    TargetExists,
)
from registry.manifest import digest_of, read_manifest, verify_bundle
from registry.moves import move_channel
from registry.store import FolderStore
from tests.registry.damage import FILES, edit_manifest, flip_byte


@pytest.fixture
def digest(bundle: Path, store: FolderStore) -> str:
    """A bundle in the store."""
    return push(bundle, store)


@pytest.fixture
def stored(store: FolderStore, digest: str) -> Path:
    """The folder in which the store keeps it."""
    return store.root / "models" / "tiny" / digest


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_push_refuses_one_changed_byte(bundle: Path, store: FolderStore, name: str, position: int) -> None:
    flip_byte(bundle / name, position)
    with pytest.raises(DigestMismatch, match=name):
        push(bundle, store)
    assert not (store.root / "models").exists()


def test_push_refuses_a_broken_manifest(bundle: Path, store: FolderStore) -> None:
    flip_byte(bundle / "manifest.json", 0)
    with pytest.raises(ManifestInvalid):
        push(bundle, store)


def test_push_refuses_links_and_extra_and_missing_files(bundle: Path, store: FolderStore) -> None:
    (bundle / "note.txt").write_text("")
    with pytest.raises(BundleIncomplete, match=r"not in the manifest \['note.txt'\]"):
        push(bundle, store)
    (bundle / "note.txt").unlink()
    (bundle / "link").symlink_to(bundle / "model.onnx")
    with pytest.raises(BundleIncomplete, match=r"link .*symbolic link"):
        push(bundle, store)
    (bundle / "link").unlink()
    (bundle / "golden.npz").unlink()
    with pytest.raises(BundleIncomplete, match=r"missing \['golden.npz'\]"):
        push(bundle, store)
    assert not (store.root / "models").exists()


@pytest.mark.parametrize("name", ["../escaped", "models/../../escaped", "/escaped"])
def test_push_refuses_a_manifest_that_reaches_outside(bundle: Path, store: FolderStore, name: str) -> None:
    shutil.copy(bundle / "golden.npz", bundle.parent / "escaped")
    edit_manifest(bundle, lambda d: d["files"].update({name: d["files"]["golden.npz"]}))
    with pytest.raises(ManifestInvalid, match="leaves the bundle"):
        push(bundle, store)
    edit_manifest(bundle, lambda d: (d["files"].pop(name), d.update(model_name="../escaped")))
    with pytest.raises(ManifestInvalid, match="is not a name"):
        push(bundle, store)
    assert not (store.root / "models").exists()


def test_pull_makes_the_same_bundle(store: FolderStore, bundle: Path, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    assert pull(store, "tiny", digest, target) == read_manifest(bundle)
    assert verify_bundle(target, digest)
    assert names_in(target.parent) == ["target"]


def test_pull_reports_its_progress(store: FolderStore, digest: str, bundle: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    pull(store, "tiny", digest, tmp_path / "target", lambda done, total: reports.append((done, total)))
    total = sum(path.stat().st_size for path in bundle.iterdir())
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert {size for _, size in reports} == {total}
    assert reports[-1] == (total, total)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("position", [0, -1])
def test_pull_refuses_one_changed_byte_in_the_store(
    store: FolderStore, stored: Path, tmp_path: Path, name: str, position: int
) -> None:
    digest = stored.name
    flip_byte(stored / name, position)
    before = names_in(tmp_path)
    with pytest.raises(DigestMismatch, match=name):
        pull(store, "tiny", digest, tmp_path / "target")
    assert names_in(tmp_path) == before
    with pytest.raises(DigestMismatch, match=name):
        verify_stored(store, "tiny", digest)


@pytest.mark.parametrize(
    "check",
    [
        lambda store, digest, target: pull(store, "tiny", digest, target),
        lambda store, digest, target: verify_stored(store, "tiny", digest),
    ],
    ids=["pull", "verify"],
)
def test_damaged_folder_in_the_store_is_refused(
    store: FolderStore, digest: str, stored: Path, tmp_path: Path, check: Callable[..., object]
) -> None:
    def refused(match: str) -> None:
        with pytest.raises(BundleIncomplete, match=match):
            check(store, digest, tmp_path / "target")
        assert not (tmp_path / "target").exists()

    (stored / "extra").write_text("")
    refused(r"missing \[\], not in the manifest \['extra'\]")
    (stored / "extra").unlink()
    (stored / "golden.npz").rename(tmp_path / "golden.npz")
    refused(r"missing \['golden.npz'\], not in the manifest \[\]")
    (stored / "golden.npz").symlink_to(tmp_path / "golden.npz")
    refused("symbolic link")
    (stored / "manifest.json").unlink()
    refused(r"manifest\.json of tiny .* is missing")


def test_bundle_under_another_models_name_is_refused(store: FolderStore, digest: str, stored: Path) -> None:
    moved = store.root / "models" / "other" / digest
    moved.parent.mkdir()
    stored.rename(moved)
    with pytest.raises(ManifestInvalid, match="is a bundle of tiny"):
        read_stored(store, "other", digest)


def test_pull_accepts_a_target_that_is_the_bundle(store: FolderStore, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    pull(store, "tiny", digest, target)
    inode = target.stat().st_ino
    assert pull(store, "tiny", digest[:8], target) == read_manifest(target)
    assert target.stat().st_ino == inode


def test_pull_fills_an_empty_folder(
    store: FolderStore, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path / "target")
    pull(store, "tiny", digest, Path())
    assert verify_bundle(tmp_path / "target", digest)


def test_pull_refuses_a_target_that_is_something_else(
    store: FolderStore, digest: str, bundles: list[Path], tmp_path: Path
) -> None:
    other, file = shutil.copytree(bundles[1], tmp_path / "other"), tmp_path / "file"
    file.write_text("mine")
    pull(store, "tiny", digest, tmp_path / "damaged")
    flip_byte(tmp_path / "damaged" / "model.onnx")
    for target in (other, file, tmp_path / "damaged"):
        with pytest.raises(TargetExists, match=f"{target} is there and is not bundle {digest}"):
            pull(store, "tiny", digest, target)
    assert digest_of(other) == digest_of(bundles[1])
    assert file.read_text() == "mine"


def test_pull_that_loses_a_race_accepts_only_the_same_bundle(
    store: FolderStore, digest: str, bundles: list[Path], tmp_path: Path
) -> None:
    def fill(target: Path, source: Path) -> None:
        if not target.exists():
            shutil.copytree(source, target)

    same, other = tmp_path / "same", tmp_path / "other"
    pull(store, "tiny", digest, same, lambda done, total: fill(same, bundles[0]))
    assert verify_bundle(same, digest)
    with pytest.raises(TargetExists, match=digest):
        pull(store, "tiny", digest, other, lambda done, total: fill(other, bundles[1]))
    assert names_in(tmp_path) == ["bundle", "other", "registry", "same"]


def test_resolve_finds_digests_prefixes_and_channels(store: FolderStore, digest: str) -> None:
    move_channel(store, "tiny", "canary", digest, None, moved_by="ann")
    for reference in (digest, digest[:8], digest[:40], "canary"):
        assert resolve(store, "tiny", reference) == digest
    with pytest.raises(ChannelNotFound, match="channel production of tiny was never set"):
        resolve(store, "tiny", "production")


@pytest.mark.parametrize("reference", ["", "abc", "a" * 7, "a" * 65, "A" * 8, "staging", "../../etc", "g" * 64])
def test_resolve_refuses_what_names_nothing(store: FolderStore, digest: str, reference: str) -> None:
    with pytest.raises(ReferenceInvalid, match="use production, canary or 8 to 64 hex digits"):
        resolve(store, "tiny", reference)


def test_resolve_names_what_is_not_there(store: FolderStore, digest: str) -> None:
    with pytest.raises(BundleNotFound, match=f"no bundle 00000000 of tiny in {store}$"):
        resolve(store, "tiny", "0" * 8)
    with pytest.raises(BundleNotFound, match=f"no bundle {digest} of nano in {store}, whose models are: tiny$"):
        resolve(store, "nano", digest)
    with pytest.raises(BundleNotFound, match=r"models are: none yet$"):
        resolve(FolderStore(store.root / "empty"), "nano", digest)


def test_resolve_refuses_a_prefix_of_two_bundles(store: FolderStore, digest: str, stored: Path) -> None:
    twin = digest[:20] + "0" * 44
    shutil.copytree(stored, stored.parent / twin)
    with pytest.raises(AmbiguousDigest, match=f"fits 2 bundles of tiny: .*{twin}"):
        resolve(store, "tiny", digest[:12])
    assert resolve(store, "tiny", digest) == digest


def test_resolve_refuses_a_channel_whose_bundle_is_gone(store: FolderStore, digest: str, stored: Path) -> None:
    move_channel(store, "tiny", "production", digest, None, moved_by="ann")
    shutil.rmtree(stored)
    with pytest.raises(BundleNotFound, match=digest):
        resolve(store, "tiny", "production")


def test_verify_stored_accepts_a_whole_bundle(store: FolderStore, digest: str, bundle: Path) -> None:
    reports: list[tuple[int, int]] = []
    assert verify_stored(store, "tiny", digest, lambda *report: reports.append(report)) == read_manifest(bundle)
    assert len(reports) == len(names_in(bundle))
    assert reports[-1][0] == reports[-1][1]


def test_list_shows_every_bundle_with_its_channels(store: FolderStore, bundles: list[Path], tmp_path: Path) -> None:
    older = shutil.copytree(bundles[1], tmp_path / "older")
    edit_manifest(older, lambda d: d.update(created_at="2025-01-01T00:00:00Z"))
    other = shutil.copytree(bundles[2], tmp_path / "other")
    edit_manifest(other, lambda d: d.update(model_name="another"))
    young, old, another = push(bundles[0], store), push(older, store), push(other, store)
    for channel in ("production", "canary"):
        move_channel(store, "tiny", channel, old, None, moved_by="ann")
    listed = list_bundles(store)
    assert [(b.model, b.digest, b.channels) for b in listed] == [
        ("another", another, ()),
        ("tiny", old, ("production", "canary")),
        ("tiny", young, ()),
    ]
    assert [b.digest for b in list_bundles(store, "tiny")] == [old, young]
    assert all(b.manifest is not None and not b.fault for b in listed)
    assert list_bundles(store, "nano") == []


def test_list_shows_a_bundle_it_cannot_read(store: FolderStore, digest: str, stored: Path, bundles: list[Path]) -> None:
    good = push(bundles[1], store)
    flip_byte(stored / "manifest.json")
    faults = {bundle.digest: bundle.fault for bundle in list_bundles(store)}
    assert faults[good] == ""
    assert "has digest" in faults[digest]
