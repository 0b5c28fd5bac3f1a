"""Kernels run in Triton's interpreter on the CPU, or as they are where there is a GPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]  # where triton has no wheel


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled for this processor."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
