"""A fresh copy of one real bundle, and an empty store of each kind, for every test."""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from registry.s3_store import S3Store
from registry.store import Bucket, FolderStore, Store
from tests.bundles import make_bundle
from tests.registry.s3 import CREDENTIALS, ENDPOINT_VARIABLE, Proxy, faulty_proxy, s3_server

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


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """An S3 endpoint over HTTP, started once a session, and a bucket in it."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as url:
        if ENDPOINT_VARIABLE not in os.environ:
            for name, value in CREDENTIALS.items():
                patch.setenv(name, value)
        yield url


@pytest.fixture
def s3_place(s3_url: str) -> str:
    """The URL of an empty registry in that bucket."""
    bucket, _, query = s3_url.partition("?")
    return f"{bucket}/{secrets.token_hex(8)}?{query}"


@pytest.fixture
def s3_store(s3_place: str) -> S3Store:
    return S3Store(Bucket(s3_place, pause_seconds=0))


@pytest.fixture(scope="session")
def session_proxy(s3_url: str) -> Iterator[Proxy]:
    with faulty_proxy(s3_url.partition("endpoint=")[2]) as proxy:
        yield proxy


@pytest.fixture
def proxy(session_proxy: Proxy) -> Proxy:
    """What breaks the connections of `broken_store`, when told to."""
    session_proxy.seen.clear()
    session_proxy.faults.clear()
    return session_proxy


@pytest.fixture
def broken_store(s3_place: str, proxy: Proxy) -> S3Store:
    """The store at the same place as `s3_store`, through the proxy; a second without an answer is a broken line."""
    place = s3_place.partition("endpoint=")[0] + f"endpoint={proxy.url}"
    return S3Store(Bucket(place, pause_seconds=0, timeout_seconds=5))


@pytest.fixture(params=["folder", "s3"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store in turn."""
    found: Store = request.getfixturevalue("store" if request.param == "folder" else "s3_store")
    return found
