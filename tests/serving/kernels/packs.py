"""Random packed batches and matrices, and the rule by which a kernel's error is judged."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.engines.bert import Packed
from serving.engines.packing import TILE, list_tiles
from serving.kernels import reference

NEEDS_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs capability 9.x"
    ),
]
# Rows whose last tiles `gemm_wide` has as halves, with 4 or with 16 across on 132 processors: in the first round or
# a later one, some second halves with no row or a single one.
HALVED_ROWS = [1, 65, 1024, 4353, 4417, 4480, 6272]
TOKENS = 30  # size of the vocabulary the batches draw from


def make_packed(lengths: Sequence[int], device: torch.device) -> Packed:
    """Random ids of sequences of the given lengths."""
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    sizes = torch.tensor(lengths)
    starts, ends = bounds[:-1].repeat_interleave(sizes), bounds[1:].repeat_interleave(sizes)
    ids = torch.randint(0, TOKENS, (int(bounds[-1]),), dtype=torch.int32)
    return Packed(*(each.to(device) for each in (ids, starts, ends, bounds, cut(bounds))))


def cut(bounds: Tensor) -> Tensor:
    """What `list_tiles` says of sequences."""
    tiles = torch.zeros(2 + 3 * (len(bounds) + int(bounds[-1]) // TILE), dtype=torch.int32)
    list_tiles(bounds.numpy().astype(np.int64), tiles.numpy())
    return tiles


def poisoned(*shape: int, device: torch.device, dtype: torch.dtype = torch.float16) -> Tensor:
    """Memory that shows whatever a kernel leaves unwritten."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal float16 on the GPU."""
    return (torch.randn(*shape, device="cuda") * scale).half()


def sum_rows(x: Tensor, columns: int = 192) -> Tensor:
    """Float32 [T, parts, 2]: sum and sum of squares of each row of x, in parts of so many columns, as `gemm_wide`."""
    parts = x.float().view(len(x), -1, columns)
    return torch.stack([parts.sum(2), parts.square().sum(2)], dim=2)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 with one scale, float32 [1], for all."""
    scale = (x.float().abs().amax() / reference.E4M3_MAX).reshape(1)
    return reference.quantize_tensor(x, scale), scale


def in_order(values: Tensor, width: int = 64) -> Tensor:
    """What `gemm_wide` wrote in E4M3, or `feed_forward`, by 16, in the order of its columns: float32."""
    return values.float().unflatten(1, (-1, 4, width // 8, 2)).transpose(2, 3).flatten(1)


def activate(half: Tensor) -> Tensor:
    """The GELU of twice a value in float16, as `activate` of wide_results.cuh."""
    first, third = (torch.tensor(each).half().float() for each in (1.5972, 0.28417))
    inner = (((half * half).float() * third + first).half() * half).float().tanh().half()
    return (half.float() * inner.float() + half.float()).half()


def narrow(halves: Tensor, factor: Tensor) -> Tensor:
    """Halves times the factor in E4M3, as `narrow` of wide_results.cuh; float32."""
    largest = reference.E4M3_MAX
    return (halves * factor.half()).float().clamp(-largest, largest).to(torch.float8_e4m3fn).float()


def relative_error(out: Tensor, oracle: Tensor) -> float:
    return float((out.double() - oracle.double()).norm() / oracle.double().norm())


def assert_as_exact_as(out: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """Error against float32 at most twice that of plain PyTorch in the same dtype."""
    assert bool(torch.isfinite(out.float()).all())
    assert relative_error(out, oracle) <= 2 * relative_error(plain, oracle)
