"""The manifest: what it accepts, what it refuses and how it says so."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import BundleIncomplete, DigestMismatch, ManifestInvalid
from registry.manifest import (
    FileEntry,
    digest_of,
    is_digest,
    is_name,
    list_files,
    payload_checksum,
    read_manifest,
    scan_files,
    verify_bundle,
    write_manifest,
)
from tests.registry.damage import FILES, edit_manifest, flip_byte

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
TABLES = st.dictionaries(st.text(min_size=1), st.builds(FileEntry, sha256=DIGESTS, size=st.integers(0, 2**60)))


def test_manifest_round_trips(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    (tmp_path / "copy").mkdir()
    assert write_manifest(tmp_path / "copy", manifest) == digest_of(bundle)
    assert read_manifest(tmp_path / "copy") == manifest


def test_digest_is_the_hash_of_the_manifest_file(bundle: Path) -> None:
    assert digest_of(bundle) == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def test_verify_accepts_a_whole_bundle(bundle: Path) -> None:
    assert verify_bundle(bundle, digest_of(bundle)) == read_manifest(bundle)


@pytest.mark.parametrize("where", [(), ("validation",), ("lineage",), ("engines", 0)])
def test_manifest_names_an_unknown_key(bundle: Path, where: tuple[str | int, ...]) -> None:
    def add_key(document: dict) -> None:
        for step in where:
            document = document[step]
        document["surprise"] = 1

    edit_manifest(bundle, add_key)
    with pytest.raises(ManifestInvalid, match=r"\.".join([*map(str, where), "surprise"]) + ": unknown key"):
        read_manifest(bundle)


@pytest.mark.parametrize("key", ["model_name", "variant", "version"])
@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "ü", "x\n", "n" * 129])
def test_manifest_refuses_bad_names(bundle: Path, key: str, name: str) -> None:
    edit_manifest(bundle, lambda document: document.update({key: name}))
    with pytest.raises(ManifestInvalid, match=f"{key}: .*is not a name"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "name", ["../model.onnx", "/etc/passwd", "a/../../b", "a\\b", "..", "", ".", "./a", "a//b", "a/", "a\x1b[2J", "a\n"]
)
def test_manifest_refuses_bad_paths(bundle: Path, name: str) -> None:
    edit_manifest(bundle, lambda document: document["files"].update({name: document["files"]["model.onnx"]}))
    with pytest.raises(ManifestInvalid, match="use a plain relative path"):
        read_manifest(bundle)


def test_manifest_refuses_a_wrong_checksum(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document.update(checksum="0" * 64))
    with pytest.raises(ManifestInvalid, match="checksum is not the digest of the files table"):
        read_manifest(bundle)


def test_manifest_refuses_an_engine_file_it_does_not_list(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document["engines"][0].update(size=1))
    with pytest.raises(ManifestInvalid, match=r"engine file 'model\.onnx' is not listed"):
        read_manifest(bundle)


def test_manifest_refuses_to_list_itself(bundle: Path) -> None:
    edit_manifest(bundle, lambda d: d["files"].update({"manifest.json": d["files"]["model.onnx"]}))
    with pytest.raises(ManifestInvalid, match=r"manifest\.json cannot be listed"):
        read_manifest(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 2}', '{"dimension": NaN}'])
def test_manifest_refuses_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestInvalid):
        read_manifest(tmp_path)


def test_manifest_refuses_bytes_that_are_not_text(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestInvalid):
        read_manifest(bundle)


@pytest.mark.parametrize("function", [read_manifest, digest_of, verify_bundle])
def test_folder_without_manifest_says_so(tmp_path: Path, function) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    for name, why in (
        (".", ":"),
        ("missing", ", for it does not exist:"),
        ("file", ", for it is no folder:"),
        ("folder", ":"),
    ):
        with pytest.raises(ManifestInvalid, match=rf"holds no manifest\.json{why}"):
            function(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_verify_names_the_file_with_one_changed_byte(bundle: Path, name: str, position: int) -> None:
    flip_byte(bundle / name, position)
    with pytest.raises(DigestMismatch, match=name):
        verify_bundle(bundle)


def test_verify_compares_the_manifest_with_the_digest_asked_for(bundle: Path) -> None:
    digest = digest_of(bundle)
    with (bundle / "manifest.json").open("a") as stream:
        stream.write(" ")
    assert verify_bundle(bundle)
    with pytest.raises(DigestMismatch, match=digest):
        verify_bundle(bundle, digest)


def test_verify_names_missing_and_extra_files(bundle: Path) -> None:
    (bundle / "model.onnx").rename(bundle / "other.onnx")
    with pytest.raises(BundleIncomplete, match=r"missing \['model.onnx'\], not in the manifest \['other.onnx'\]"):
        verify_bundle(bundle)


def test_verify_refuses_links_to_files_and_folders(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(bundle / "model.onnx", tmp_path / "model.onnx")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(BundleIncomplete, match=r"model.onnx .* is a symbolic link"):
        verify_bundle(bundle)
    (bundle / "model.onnx").unlink()
    (bundle / "reports").symlink_to(tmp_path)
    with pytest.raises(BundleIncomplete, match=r"reports .* is a symbolic link"):
        verify_bundle(bundle)


def test_verify_refuses_special_files(bundle: Path) -> None:
    os.mkfifo(bundle / "pipe")
    with pytest.raises(BundleIncomplete, match=r"pipe .* is a special file"):
        verify_bundle(bundle)


def test_files_in_folders_are_listed_by_relative_path(bundle: Path) -> None:
    (bundle / "reports" / "deep").mkdir(parents=True)
    (bundle / "reports" / "deep" / "quality.json").write_text("{}")
    assert "reports/deep/quality.json" in scan_files(bundle)
    assert sorted(list_files(bundle)) == sorted([*scan_files(bundle), "manifest.json"])


@given(TABLES)
def test_checksum_does_not_depend_on_order(table: dict[str, FileEntry]) -> None:
    assert payload_checksum(dict(reversed(table.items()))) == payload_checksum(table)


@given(TABLES, st.text(min_size=1), DIGESTS)
def test_checksum_changes_with_the_table(table: dict[str, FileEntry], name: str, digest: str) -> None:
    changed = {**table, name: FileEntry(sha256=digest, size=2**61)}
    assert payload_checksum(changed) != payload_checksum(table)


@given(st.text())
def test_names_are_single_visible_path_parts(text: str) -> None:
    if is_name(text):
        assert Path(text).name == text
        assert text.isprintable()
        assert not text.startswith(".")


def test_digests_have_one_spelling() -> None:
    assert is_digest("0123456789abcdef" * 4)
    for text in ("", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" + "a" * 61):
        assert not is_digest(text)
