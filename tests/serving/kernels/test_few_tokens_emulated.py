"""The cluster's kernel itself, without a GPU: see `emulate`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.engines.bert import BertConfig, Weights, encode
from serving.engines.cuda_encoder import Encoder
from serving.kernels import few_tokens_cluster
from serving.kernels.compiled import TensorMap
from serving.kernels.few_tokens_cluster import FewTokensCluster
from tests.serving.kernels.emulate import NEEDS_COMPILER, EmulatedKernel, Schedule, describe
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import make_packed, relative_error

pytestmark = NEEDS_COMPILER
FEEDER = 1 << 16  # the 17th warp


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(folder / "model", 384, 12, 1536, layers=3))


@pytest.fixture(autouse=True)
def _emulate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedKernel, "folder", folder, raising=False)
    monkeypatch.setattr(EmulatedKernel, "argument", "Input")
    monkeypatch.setattr(few_tokens_cluster, "CudaKernel", EmulatedKernel)
    monkeypatch.setattr(TensorMap, "of", describe)
    monkeypatch.setattr(FewTokensCluster, "fits", lambda *sizes: True)


@pytest.mark.parametrize(
    ("lengths", "pooling", "seed"), [([13, 2, 17], "mean", 0), ([20], "mean", 1), ([5, 11], "cls", 1)]
)
def test_the_emulated_cluster_equals_the_oracle(
    lengths: list[int], pooling: str, seed: int, model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedKernel, "schedule", Schedule(seed, slow=FEEDER * seed))
    config, weights = replace(model[0], pooling=pooling), model[1]
    encoder = Encoder(weights, config, torch.device("cpu"), max_tokens=32, max_rows=4)
    assert isinstance(encoder._few, FewTokensCluster)
    encoder._out.fill_(float("nan"))
    batch = make_packed(lengths, torch.device("cpu"))
    assert relative_error(encoder.run(batch), encode(weights, config, batch)) < 5e-3
