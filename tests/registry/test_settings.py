"""`[registry]` of thorforge.toml: read where it is needed, its variables win, a fault is named."""

from pathlib import Path

import pytest

from registry.client import pull, push
from registry.errors import BundleTooLarge, SettingsInvalid, SignatureMissing
from registry.folder_store import FolderStore
from registry.manifest import read_signature
from registry.settings import RegistrySettings, load_settings
from registry.signing import make_keys
from registry.store import open_store


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """thorforge.toml of the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "thorforge.toml"


def test_settings_default_then_file_then_variable(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings() == RegistrySettings()
    settings.write_text("[registry]\nmax_bundle_bytes = 5\ncache_bytes = 6\n[promote]\nunknown = 1")
    monkeypatch.setenv("THORFORGE_CACHE_BYTES", "7")
    assert load_settings() == RegistrySettings(max_bundle_bytes=5, cache_bytes=7)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[registry]\nmax_bundle_byte = 5", "max_bundle_byte: unknown key"),
        ("[registry]\nmax_bundle_bytes = 0", "max_bundle_bytes: .*greater than or equal to 1"),
        ("registry = 5", "registry in thorforge.toml is no section"),
        ("[registry", "cannot be read as TOML"),
    ],
)
def test_settings_fault_is_named(settings: Path, store: FolderStore, bundle: Path, text: str, reason: str) -> None:
    settings.write_text(text)
    with pytest.raises(SettingsInvalid, match=reason):
        push(bundle, store)
    assert store.list_models() == []


def test_settings_keys_sign_and_are_asked_for(
    settings: Path, store: FolderStore, bundles: list[Path], tmp_path: Path
) -> None:
    unsigned = push(bundles[0], store)
    make_keys(tmp_path / "release.pem", tmp_path / "release.pub")
    settings.write_text('[registry]\npublic_key = "release.pub"\nsigning_key = "release.pem"')
    signed = push(bundles[1], store)
    pull(store, "tiny", signed, tmp_path / "signed")
    assert read_signature(tmp_path / "signed")
    with pytest.raises(SignatureMissing):
        pull(store, "tiny", unsigned, tmp_path / "unsigned")


def test_settings_limit_holds_for_push_and_pull(
    settings: Path, store: FolderStore, bundles: list[Path], tmp_path: Path
) -> None:
    digest = push(bundles[0], store)
    settings.write_text("[registry]\nmax_bundle_bytes = 100")
    with pytest.raises(BundleTooLarge, match=r"the limit is 100 \(registry\.max_bundle_bytes\)"):
        push(bundles[1], store)
    with pytest.raises(BundleTooLarge, match="the limit is 100"):
        pull(store, "tiny", digest, tmp_path / "back")


def test_settings_place_is_what_commands_take_by_default(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THORFORGE_REGISTRY", raising=False)
    settings.write_text('[optimize]\nregistry = "here"')
    assert str(open_store()) == str(tmp_path / "here")
    monkeypatch.setenv("THORFORGE_REGISTRY", str(tmp_path / "there"))
    assert str(open_store()) == str(tmp_path / "there")
