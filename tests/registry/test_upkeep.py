"""`thorforge registry gc|fsck|sign|keys` at a terminal."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from registry.cli import app
from registry.client import push
from registry.folder_store import FolderStore
from registry.manifest import verify_bundle
from registry.moves import move_channel
from tests.registry.damage import flip_byte


@pytest.fixture
def digests(store: FolderStore, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three pushed bundles; production points at the first."""
    monkeypatch.setenv("THORFORGE_REGISTRY", str(store))
    pushed = [push(bundle, store) for bundle in bundles]
    move_channel(store, "tiny", "production", pushed[0], None, moved_by="ann")
    return pushed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_gc_deletes_what_nothing_needs(digests: list[str], store: FolderStore) -> None:
    assert json.loads(run("gc", "tiny", "--json").stdout)["deleted"] == []
    planned = run("gc", "tiny", "--min-age-days", "0", "--dry-run")
    assert planned.stdout.split() == sorted(digests[1:])
    assert "would delete 2 bundles" in planned.stderr
    assert run("gc", "tiny", "--min-age-days", "0").stdout == planned.stdout
    assert store.list_digests("tiny") == digests[:1]


def test_fsck_names_every_fault(digests: list[str], store: FolderStore) -> None:
    assert run("fsck").exit_code == 0
    flip_byte(store.root / "models" / "tiny" / digests[1] / "model.onnx")
    (store.root / "models" / "tiny" / digests[2] / "golden.npz").unlink()
    assert run("fsck", "--quick").stdout.count("\n") == 1
    found = run("fsck", "--json")
    assert found.exit_code == 1
    assert sorted(fault["subject"] for fault in json.loads(found.stdout)) == sorted(digests[1:])


def test_stored_bundle_is_signed_by_who_holds_the_key(
    digests: list[str], store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = tmp_path / "release.pem", tmp_path / "release.pub"
    assert run("keys", str(private), str(public)).exit_code == 0
    assert run("keys", str(private), str(public)).exit_code == 1
    monkeypatch.setenv("THORFORGE_PUBLIC_KEY", str(public))
    refused = run("pull", "tiny", digests[0], str(tmp_path / "pulled"))
    assert (refused.exit_code, "is not signed" in refused.stderr) == (1, True)
    assert run("sign", "tiny", "production", "--key", str(public)).exit_code == 1
    assert run("sign", "tiny", "production", "--key", str(private)).stdout.strip() == digests[0]
    assert run("pull", "tiny", digests[0], str(tmp_path / "pulled")).exit_code == 0
    assert verify_bundle(tmp_path / "pulled", digests[0], public)
