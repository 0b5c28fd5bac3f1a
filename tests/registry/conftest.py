"""A fresh copy of one real bundle, and an empty store, for every test."""

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from registry.store import FolderStore
from tests.bundles import make_bundle

# A busy machine is not a failing property.
settings.register_profile("registry", deadline=None)
settings.load_profile("registry")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three bundles of one model that differ in their weights; tests read them and leave them alone."""
    root = tmp_path_factory.mktemp("bundles")
    for seed in range(3):
        make_bundle(root / f"seed{seed}", seed=seed)
    return sorted(root.iterdir())


@pytest.fixture
def bundle(bundles: list[Path], tmp_path: Path) -> Path:
    """A bundle the test may damage."""
    return shutil.copytree(bundles[0], tmp_path / "bundle")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "registry")
