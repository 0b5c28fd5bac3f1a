"""A tiny bundle, its loaded model, and a real server in a thread."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.autotune import Choice
from serving.containment import OpenEngine
from serving.engines import Engine
from serving.models import LoadedModel, load_model
from serving.server import WorkerServer, base_url, bind
from serving.settings import ModelSource, Settings
from serving.worker import Worker
from tests.bundles import make_bundle
from tests.serving.engines import WrappedEngine

DIMENSION = 8
MAX_LENGTH = 16


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    make_bundle(folder, dimension=DIMENSION, max_length=MAX_LENGTH)
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three versions of `tiny`, another model, and bundles that cannot be served."""
    root = tmp_path_factory.mktemp("root")
    for seed in range(3):
        make_bundle(root / f"v{seed}", seed=seed)
    make_bundle(root / "other", name="other", seed=7)
    make_bundle(root / "wide", dimension=12)
    make_bundle(root / "long", max_length=600)
    shutil.copytree(root / "v1", root / "damaged")
    (root / "damaged" / "model.onnx").write_bytes(b"not a graph")
    return root


@pytest.fixture(scope="session")
def model(bundle: Path) -> LoadedModel:
    return load_model(ModelSource(path=bundle))


def make_settings(bundle: Path, **changes: Any) -> Settings:
    """Settings of a test's worker: a free port, no grace time."""
    values = {"port": 0, "drain_grace_seconds": 0, "models": {"available": [{"path": bundle}]}}
    return Settings.model_validate(values | changes)


class PreparedWorker(Worker):
    """Serves a model that the test prepared."""

    def __init__(self, settings: Settings, prepared: LoadedModel) -> None:
        super().__init__(settings)
        self.prepared = prepared

    async def load(self) -> None:
        self.add(self.prepared)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return when that is so; half a minute is for a machine busy with other work."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def serve(settings: Settings, prepared: LoadedModel) -> Iterator[tuple[str, WorkerServer]]:
    """A real server in a thread; yields its base URL and itself once it is ready."""
    listener = bind(settings)
    url = base_url(listener, is_tls=settings.tls.certificate is not None)
    ready = threading.Event()
    server = WorkerServer(PreparedWorker(settings, prepared), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(30)
        yield url, server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def keep_open(model: LoadedModel) -> LoadedModel:
    """The same model, for a service that will close its engine although others still use it."""
    return with_engine(model, WrappedEngine(model.engine))


def with_engine(model: LoadedModel, engine: Engine, reopen: OpenEngine | None = None) -> LoadedModel:
    """The same model on another engine, which only `reopen` can replace."""
    setup = replace(model.choice.large, num_instances=1)  # one run at a time, so that tests can tell what waits
    return replace(model, engine=engine, choice=Choice(setup, setup), reopen=reopen, open_spare=None)


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    """A worker on the tiny bundle, shared by the tests of a module."""
    own = load_model(ModelSource(path=bundle))
    with serve(make_settings(bundle), own) as (address, _):
        yield address
