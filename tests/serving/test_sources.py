"""Where bundles lie, and that a name in a request leads nowhere else."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.manifest import digest_of
from serving.errors import BundleRejected, InvalidRequest
from serving.sources import find_bundle, fingerprint, locate_bundle


@pytest.fixture
def root(tmp_path: Path, bundle: Path) -> Path:
    """A root with a bundle, and things a name could try to reach."""
    folder = tmp_path / "root"
    (folder / "models" / "tiny").mkdir(parents=True)
    (folder / "inside").symlink_to(folder / "models" / "tiny")
    (folder / "outside").symlink_to(bundle)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "itself").symlink_to(folder)
    (folder / "file").write_text("x")
    return folder


def test_bundle_is_a_folder_or_a_line_that_names_it(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    assert (locate_bundle(bundle).folder, locate_bundle(bundle).digest) == (bundle, digest)
    (tmp_path / "near").symlink_to(bundle)
    for line in (f"{bundle}\n", "near", "  near  \n"):
        (tmp_path / "current").write_text(line)
        assert locate_bundle(tmp_path / "current").digest == digest


def test_bundle_is_what_a_channel_of_a_registry_points_at(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    channel = tmp_path / "channels" / "tiny" / "production.json"
    channel.parent.mkdir(parents=True)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / digest).symlink_to(bundle)
    channel.write_text(json.dumps({"model": "tiny", "channel": "production", "digest": digest, "sequence": 1}))
    assert locate_bundle(channel).digest == digest
    other = "0" * 64
    (tmp_path / "models" / "tiny" / other).symlink_to(bundle)
    channel.write_text(json.dumps({"model": "tiny", "digest": other}))
    with pytest.raises(BundleRejected, match=f"names digest {other}, but .* holds {digest}"):
        locate_bundle(channel)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is empty"),
        (b"x" * 70_000, "longer than 65536 bytes"),
        (b"one\ntwo", "several lines"),
        (b"{}", "needs a model and a digest"),
        (b'{"model": "../../etc", "digest": "' + b"0" * 64 + b'"}', "needs a model and a digest"),
        (b'{"model": "tiny", "digest": null}', "points at no bundle any more"),
        (b'{"model"', "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"nowhere", "holds no manifest.json"),
    ],
)
def test_file_that_names_no_bundle_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "current").write_bytes(text)
    with pytest.raises(BundleRejected, match=message):
        locate_bundle(tmp_path / "current")
    assert fingerprint(tmp_path / "current") == fingerprint(tmp_path / "current")


def test_name_below_the_root_is_found(root: Path) -> None:
    expected = (root / "models" / "tiny").resolve()
    assert [find_bundle(root, name) for name in ("models/tiny", "inside", "itself/inside")] == [expected] * 3


@pytest.mark.parametrize(
    "name",
    [
        "/etc", "..", "models/../..", "models/../../root/models", "outside", "outside/../x", "circle", "file", "file/x",
        "itself", ".", "", "nowhere", "models\\tiny", "models/tiny\0", "tiny\n", "x" * 5000, "a/" * 400 + "b" * 200,
        "~", "C:/windows", "models/" + "x" * 300,
    ],
)  # fmt: skip
def test_name_that_leads_elsewhere_is_refused_and_not_repeated(root: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        find_bundle(root, name)
    assert len(name) < 5 or name not in str(raised.value)
    assert str(root) not in str(raised.value)


@given(st.lists(st.sampled_from(["..", ".", "models", "tiny", "outside", "/", "inside", "", "x"]), max_size=6))
def test_name_never_leaves_the_root(parts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        base = Path(place).resolve() / "root"
        (base / "models" / "tiny").mkdir(parents=True)
        (base.parent / "secret").mkdir()
        (base / "outside").symlink_to(base.parent / "secret")
        try:
            found = find_bundle(base, "/".join(parts))
        except InvalidRequest:
            return
        assert base in found.parents


def test_without_a_root_no_name_is_found() -> None:
    with pytest.raises(InvalidRequest, match=r"embedding\.models\.root"):
        find_bundle(None, "models/tiny")


def test_fingerprint_changes_with_every_file_and_with_what_is_named(tmp_path: Path) -> None:
    folder, pointer = tmp_path / "bundle", tmp_path / "current"
    folder.mkdir()
    pointer.write_text("bundle")
    seen = {fingerprint(pointer)}
    (folder / "a").write_text("1")
    seen.add(fingerprint(pointer))
    (folder / "a").write_text("22")
    seen.add(fingerprint(pointer))
    (folder / "a").rename(folder / "b")
    seen.add(fingerprint(pointer))
    pointer.write_text("nowhere")
    seen.add(fingerprint(pointer))
    pointer.unlink()
    seen.add(fingerprint(pointer))
    assert len(seen) == 6
