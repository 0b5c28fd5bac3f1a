"""Real runs on the real model, made once a session in a state folder of their own and shared by the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers import PrefectServer, free_port, run_prefect_server

ROOT = Path(__file__).parent.parent.parent
NAME = "all-MiniLM-L6-v2"
DEPLOYMENT_SECONDS = 1800


@dataclass(frozen=True)
class Project:
    """A working folder's state and the environment that every command of the test gets."""

    folder: Path
    env: dict[str, str]
    working_folder: Path = ROOT

    def run(self, *command: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a command in the working folder, output captured."""
        return subprocess.run(
            command, cwd=self.working_folder, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def thorforge(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run the command line; a failure shows what it printed."""
        done = self.run(sys.executable, "-c", "from flows.cli import main; main()", *arguments, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    def optimize(self, *arguments: str) -> dict[str, Any]:
        """Run `optimize --json` and return its document."""
        done = self.thorforge("optimize", "--name", NAME, "--json", *arguments)
        document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return document

    def pull(self, reference: str, target: Path) -> Path:
        """Pull a bundle from the registry."""
        self.thorforge("registry", "pull", NAME, reference, str(target))
        return target


def make_project(folder: Path) -> Project:
    """A project whose state, Prefect's included, lies in `folder`."""
    dropped = ("AKIDB_", "PREFECT_", "MLFLOW_", "THORFORGE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env = clean | {"THORFORGE_HOME": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return Project(folder, env | {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"})


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """State shared by the session: what one test built another finds in the cache."""
    folder = tmp_path_factory.mktemp("state")
    (folder / "prefect").mkdir()
    return make_project(folder)


@pytest.fixture(scope="session")
def prefect_server(project: Project) -> Iterator[PrefectServer]:
    """A real Prefect server on a free port, with its own database."""
    with run_prefect_server(project.env, free_port()) as server:
        yield server


@pytest.fixture(scope="session")
def optimized(project: Project) -> dict[str, Any]:
    """The default recipe's outcome on the real model."""
    return project.optimize()


@pytest.fixture(scope="session")
def fp32_bundle(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32-onnx bundle of the real model."""
    document = project.optimize("--variant", "fp32-onnx")
    assert document["published"]["name"] == "fp32-onnx"
    return project.pull(document["published"]["digest"], tmp_path_factory.mktemp("bundles") / "fp32")


@pytest.fixture(scope="session")
def data() -> Path:
    """Evaluation data beside the checkout; not part of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no evaluation data beside the checkout ({folder.name})")
    return folder
