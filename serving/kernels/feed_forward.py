"""The feed-forward block of MiniLM's sizes in E4M3, in one kernel for Hopper (capability 9.0): see feed_forward.cu.

Two GEMMs write the intermediate to memory and read it back: nearly half of a layer's traffic.
"""

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from serving.kernels.compiled import CudaKernel, TensorMap, load_beside
from serving.kernels.gemm import is_hopper
from serving.kernels.handover import starts_early

_HIDDEN, _INNER, _COLUMNS = 384, 1536, 192  # the latter of the results of a program: sums are over as many
_ROWS, _PIECE = 64, 64  # of a box of x
_TILE = 128  # rows of a cluster
_THREADS, _SHARED_BYTES, _CLUSTER = 384, 227 * 1024, 2


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's: `weights` of `arrange`; up_bias [1536], down_bias and scale [384], float16; float32 [1]: the scales
    of x and up, of the intermediate and down, and the factor that the intermediate takes.

    The norm's scale is in the matrix up, and `scale`; its shift is in both biases."""

    weights: Tensor
    up_bias: Tensor
    down_bias: Tensor
    scale: Tensor
    x_scale: Tensor
    up_scale: Tensor
    inner_scale: Tensor
    down_scale: Tensor
    inner_factor: Tensor


class _Argument(ctypes.Structure):
    """`Argument` of the kernel."""

    _fields_ = [
        *((name, TensorMap) for name in ("x", "narrow")),
        *((name, ctypes.c_void_p) for name in ("weights", "up_bias", "down_bias", "scales", "sums", "out_sums")),
        *((name, ctypes.c_void_p) for name in ("x_scale", "up_scale", "inner_scale", "down_scale", "inner_factor")),
        ("out_factor", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("num_rows", "tiles", "last", "parts")),
        ("rest", ctypes.c_char * 12),  # tensor maps make the kernel's struct a multiple of 64 bytes
    ]


def fits(up: Tensor, down: Tensor, device: torch.device) -> bool:
    """Whether the kernel takes these weights, [I, H] and [H, I], on the device."""
    is_known = up.dtype == down.dtype == torch.float8_e4m3fn
    return is_known and tuple(up.shape) == (_INNER, _HIDDEN) and is_hopper(device)


def arrange(up: Tensor, down: Tensor) -> Tensor:
    """E4M3 weights [1536, 384] and [384, 1536] as both programs of a cluster stream them: uint8 [2, 48, stage's bytes].

    Rows of `up` sum to 0, nearly.
    """
    stages = []
    for rank in range(_CLUSTER):
        rows = up.view(_CLUSTER, -1, _PIECE, _HIDDEN)[rank]  # [chunks, 64, H]
        upward = _swizzle(rows.unflatten(2, (-1, _PIECE)).transpose(1, 2))
        columns = down[rank * _COLUMNS : (rank + 1) * _COLUMNS]
        by_thread = _cut(columns)[1 - rank].unflatten(-1, (8, 4, 2)).transpose(-3, -2).flatten(-3)
        own, other = _swizzle(_cut(reorder(columns))[rank]), _swizzle(by_thread)
        for chunk in range(len(rows)):
            stages += [upward[chunk], own[chunk], other[chunk]]
    return torch.cat([each.flatten() for each in stages]).view(_CLUSTER, -1, 3 * _PIECE * _PIECE)


def reorder(weight: Tensor) -> Tensor:
    """A weight [N, K] for an x in the order in which E4M3 is written here, that of a thread's columns of each 16."""
    return weight.unflatten(1, (-1, 2, 4, 2)).transpose(2, 3).flatten(1).contiguous()


def _cut(columns: Tensor) -> Tensor:
    """Both programs' chunks of a weight [N, 1536]: [2, chunks, N, 64]."""
    return columns.unflatten(1, (_CLUSTER, -1, _PIECE)).permute(1, 2, 0, 3)


def _swizzle(blocks: Tensor) -> Tensor:
    """Rows of 64 values [..., R, 64] as the tensor cores read them: uint8, the 16 bytes of each in an order by row."""
    row, place = torch.arange(blocks.shape[-2])[:, None], torch.arange(4)
    values = blocks.contiguous().view(torch.uint8).unflatten(-1, (-1, 16))
    order = (place ^ row >> 1 & 3).to(blocks.device)
    return values.gather(-2, order[..., None].expand(values.shape)).flatten(-2)


def run(
    x: Tensor, narrow: Tensor, sums: Tensor, block: Block, out_sums: Tensor, num_programs: int, eps: float,
    is_upward: bool = False, out_factor: Tensor | None = None,
) -> None:  # fmt: skip
    """x = norm(x) + down(gelu(up(norm(x)))) in place: x float16 [T, 384], before its norm, as it leaves it.

    The product reads `narrow`, x in E4M3, which with `out_factor` (float32 [1], at most 65504) takes the result times
    it, in the order of `reorder`. `sums` (float32 [T, parts, 2]): sum and sum of squares of each row of x, in parts;
    `out_sums` [T, 2, 2] takes those of the result. `num_programs`: multiprocessors. `is_upward` begins with the last
    rows. Raises CompileFailed.
    """
    tiles = -(-len(x) // _TILE)
    tensors = (
        block.weights, block.up_bias, block.down_bias, block.scale, sums, out_sums, block.x_scale, block.up_scale,
        block.inner_scale, block.down_scale, block.inner_factor, out_factor,
    )  # fmt: skip
    pointers: list[Any] = [None if each is None else each.data_ptr() for each in tensors]
    argument = _Argument(
        TensorMap.of(x, _ROWS, _PIECE), TensorMap.of(narrow, _ROWS, _PIECE), *pointers,
        eps, len(x), tiles, tiles - 1 if is_upward else -1, sums.shape[1],
    )  # fmt: skip
    kernel = _load(x.device, out_factor is not None)
    kernel.launch(argument, _CLUSTER * min(num_programs // _CLUSTER, tiles), starts_early(x))


def prepare(device: torch.device, forms: Collection[bool]) -> None:
    """Compile the kernel with a copy of the result, or without. Raises CompileFailed."""
    load_beside(partial(_load, device), forms)


def make_macros(copies: bool) -> dict[str, int]:
    """What the kernel is compiled with."""
    return {"COPIES": int(copies)}


@cache
def _load(device: torch.device, copies: bool) -> CudaKernel:
    return CudaKernel("feed_forward", make_macros(copies), device, _THREADS, _SHARED_BYTES, _CLUSTER)
