"""The cluster's kernel itself, without a GPU: compiled for this processor, every thread of it a fiber.

What the hardware does is emulated (`emulated/cluster.cuh`): barriers that count, copies that land late and in any
order, swizzled boxes, the tensor cores' operands. So addresses are checked, and that nobody waits in vain.
"""

import ctypes
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Weights, encode
from serving.engines.cuda_encoder import Encoder
from serving.kernels import few_tokens_cluster
from serving.kernels.compiled import _FOLDER, TensorMap
from serving.kernels.few_tokens_cluster import FewTokensCluster
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import make_packed, relative_error

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
EMULATED = Path(__file__).parent / "emulated"
MEMORY = "extern __shared__ __align__(1024) u8 memory[];"
OPTIONS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-w"]


class EmulatedKernel:
    """In the place of `CudaKernel`."""

    folder: Path
    seed = 0

    def __init__(self, name: str, macros: dict[str, int], device: torch.device, *sizes: int) -> None:
        library = self.folder / f"{'-'.join(map(str, macros.values()))}.so"
        if not library.exists():
            source = (_FOLDER / f"{name}.cu").read_text()
            assert source.count(MEMORY) == 1
            (self.folder / "kernel.cu").write_text(source.replace(MEMORY, "u8* memory = Thread::own().memory + FIRST;"))
            for path in (*_FOLDER.glob("few_tokens_*.cuh"), EMULATED / "cluster.cuh", EMULATED / "run.cpp"):
                shutil.copy(path, self.folder)
            defined = [f"-D{key}={value}" for key, value in macros.items()]
            subprocess.run(["c++", *OPTIONS, *defined, self.folder / "run.cpp", "-o", library], check=True)
        self._run = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_char_p

    def launch(self, argument: ctypes.Structure, programs: int) -> None:
        failure = self._run(ctypes.byref(argument), self.seed, self.seed % 2)
        assert failure is None, failure


def describe(matrix: Tensor, rows: int, columns: int) -> TensorMap:
    """In the place of `TensorMap.of`: `Box` of the emulation."""
    assert matrix.is_contiguous()
    return TensorMap.from_buffer_copy(struct.pack("5q", matrix.data_ptr(), *matrix.shape, rows, columns).ljust(128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(folder / "model", 384, 12, 1536, layers=3))


@pytest.fixture(autouse=True)
def _emulate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedKernel, "folder", folder, raising=False)
    monkeypatch.setattr(few_tokens_cluster, "CudaKernel", EmulatedKernel)
    monkeypatch.setattr(TensorMap, "of", describe)
    monkeypatch.setattr(FewTokensCluster, "fits", lambda *sizes: True)


@pytest.mark.parametrize(
    ("lengths", "pooling", "seed"), [([13, 2, 17], "mean", 0), ([20], "mean", 1), ([5, 11], "cls", 1)]
)
def test_the_emulated_cluster_equals_the_oracle(
    lengths: list[int], pooling: str, seed: int, model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedKernel, "seed", seed)
    config, weights = replace(model[0], pooling=pooling), model[1]
    encoder = Encoder(weights, config, torch.device("cpu"), max_tokens=32, max_rows=4)
    assert isinstance(encoder._few, FewTokensCluster)
    encoder._out.fill_(float("nan"))
    batch = make_packed(lengths, torch.device("cpu"))
    assert relative_error(encoder.run(batch), encode(weights, config, batch)) < 5e-3
