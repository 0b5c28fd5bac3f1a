"""Layers folded into their neighbours are the layers: the algebra, on a twin of Hopper's GEMM in plain PyTorch."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from serving.engines.bert import BertConfig, Weights, encode
from serving.engines.cuda_folded import FoldedLayers
from serving.kernels import reference
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import make_packed

STACKED = ("out_weight", "down_weight")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder"), hidden=256, heads=4, intermediate=512, layers=3))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, num_programs: int, gelu: bool = False,
    residual: Tensor | None = None, norm: Any = None, out_sums: Tensor | None = None,
) -> None:  # fmt: skip
    """What `gemm_hopper.linear` says of itself, in float16 and with a norm."""
    width = 128 * norm.sums.shape[1]
    mean, square = (norm.sums.sum(1) / width).split(1, dim=1)
    spread = torch.rsqrt(square - mean * mean + norm.eps)
    result = x.float() @ weight.float().T
    if residual is None:
        result = (result - mean * norm.factors) * spread + bias.float()
    else:
        result += bias.float() + (residual.float() - mean) * spread * norm.factors
    if out_sums is not None:
        parts = result.view(len(result), -1, 128)
        out_sums.copy_(torch.stack([parts.sum(2), parts.square().sum(2)], dim=2))
    out.copy_(torch.nn.functional.gelu(result) if gelu else result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has the GEMM itself")
def test_folded_layers_equal_the_oracle(model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = model
    row_norm = lambda sums, factors, eps: SimpleNamespace(sums=sums, factors=factors, eps=eps)  # noqa: E731
    monkeypatch.setitem(sys.modules, "serving.kernels.gemm_hopper", SimpleNamespace(linear=linear, RowNorm=row_norm))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4))
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    tables = weights.words, weights.positions, weights.norm_weight, weights.norm_bias
    x = reference.embed_norm(batch.ids, batch.starts, *tables, config.eps).half()
    stacks = [torch.stack([getattr(layer, name).half() for layer in weights.layers]) for name in STACKED]
    area = torch.zeros(len(x) * 8 * config.hidden, dtype=torch.uint8)

    def carve(first: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return area[first : first + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    FoldedLayers(weights, config, *stacks, len(x)).run(batch, x, carve, is_long=False)
    vectors = reference.pool(x, batch.offsets, config.pooling, config.normalize)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.9999
