"""Shared by every test: a state folder of its own, a tiny real teacher, and a Prefect API where a run is needed."""

import gc
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from serving.engines import has_nvidia_driver
from serving.telemetry import disable_telemetry
from tests.forge import Forge, build_forge
from tests.teachers import make_teacher

# A busy machine is not a failing property.
settings.register_profile("thorforge", deadline=None)
settings.load_profile("thorforge")

# Of tests/e2e: what one of them built, the next finds in the cache.
_ON_THE_REAL_MODEL = {f"test_{name}" for name in ("bench", "demo", "load", "prefect", "quality", "ui", "worker")}
_SCRATCH = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any vendor is imported, because they read the environment then: nothing in the home folder, no network."""
    config.stash[_SCRATCH] = tempfile.mkdtemp(prefix="thorforge-tests-")
    os.environ |= {
        "PREFECT_HOME": config.stash[_SCRATCH],
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MPLCONFIGDIR": config.stash[_SCRATCH],
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        # Torch's threads spin at barriers: on a machine that is busy two take 200 times as long as one.
        "OMP_NUM_THREADS": "1",
    }
    if not has_nvidia_driver():  # read when a kernel's module is imported, by whichever test that is
        os.environ["TRITON_INTERPRET"] = "1"
    disable_telemetry()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Prefect's clients leave connections for the garbage collector to close."""
    for item in items:
        if "prefect_api" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadfile`: a file's tests go to one process, and so do all that share the real model's runs."""
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrModel(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "real model" if Path(file).stem in _ON_THE_REAL_MODEL else file

    return ByFileOrModel(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_SCRATCH], ignore_errors=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this test alone."""
    monkeypatch.setenv("THORFORGE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random teacher; tests read it and leave it alone."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def teacher_copy(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A teacher folder that the test may damage."""
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


@pytest.fixture(scope="session")
def session_forge(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Forge:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("forge")
        patch.setenv("THORFORGE_HOME", str(root / "state"))
        return build_forge(root, tiny_teacher)


@pytest.fixture
def forge(session_forge: Forge, home: Path, monkeypatch: pytest.MonkeyPatch) -> Forge:
    """All five variants of the tiny teacher, built, judged and timed once a session; the state folder is theirs."""
    monkeypatch.setenv("THORFORGE_HOME", str(session_forge.state))
    return session_forge


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """A real Prefect API on a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield


@pytest.fixture
def prefect(prefect_api: None, tmp_path: Path) -> Iterator[None]:
    """Real flow and task runs, whose cached results are this test's alone."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # what Prefect left open, before the next test can be blamed for it
