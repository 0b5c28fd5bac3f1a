"""Flash attention over packed sequences in CUDA C++ for Hopper (capability 9.0): see attention_hopper.cu."""

import ctypes
import math
from collections.abc import Collection
from functools import cache, partial

import torch
from torch import Tensor

from serving.kernels.compiled import CudaKernel, TensorMap, load_beside
from serving.kernels.gemm import is_hopper
from serving.kernels.handover import starts_early

HEAD_SIZES = (32, 64)
LONG_LENGTH = 32  # tokens that one attends to, on average, from which it measured faster than `attention`
_BOX = 64  # rows of queries, or keys
_PAIRS, _HEADS_OF_TICKET = 2, 2  # the former of groups in a program
_THREADS = 640
_STAGES = {32: 4, 64: 2}


class _Argument(ctypes.Structure):
    """`Argument` of the kernel."""

    _fields_ = [
        ("qkv", TensorMap),
        *((name, ctypes.c_void_p) for name in ("tiles", "ticket", "out", "out_factor")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "is_upward")),
        ("rest", ctypes.c_char * 20),  # a tensor map makes the kernel's struct a multiple of 64 bytes
    ]


def fits(hidden: int, heads: int, device: torch.device) -> bool:
    """Whether the kernel takes a model of so many heads on the device."""
    return is_hopper(device) and heads % _HEADS_OF_TICKET == 0 and hidden // heads in HEAD_SIZES


def attention(
    qkv: Tensor, tiles: Tensor, heads: int, out: Tensor, ticket: Tensor,
    num_programs: int, out_factor: Tensor | None = None, is_upward: bool = False,
) -> None:  # fmt: skip
    """See `reference.attention`: qkv float16 [T, 3H], out [T, H].

    `tiles`: int32, of `packing.list_tiles`; rows in none of them are left as they are. A sequence's result has the same
    bits in any batch. With `out_factor` (float32 [1]) out is E4M3 and takes the result times it. `ticket`: int32 [1],
    0 before and after, for no other run meanwhile. `num_programs`: multiprocessors. `is_upward` goes
    through either part of the tiles from its end. Raises CompileFailed.
    """
    size = out.shape[1] // heads
    tensors = tiles, ticket, out, out_factor
    argument = _Argument(
        TensorMap.of(qkv, _BOX, size), *(None if each is None else each.data_ptr() for each in tensors),
        math.log2(math.e) / math.sqrt(size), heads, is_upward,
    )  # fmt: skip
    most = len(tiles) // 3 * heads // (_HEADS_OF_TICKET * _PAIRS)
    _load(qkv.device, size, out_factor is not None).launch(argument, min(num_programs, most), starts_early(qkv))


def prepare(device: torch.device, size: int, forms: Collection[bool]) -> None:
    """Compile for results in E4M3, or in float16, or both. Raises CompileFailed."""
    load_beside(partial(_load, device, size), forms)


def make_macros(size: int, is_narrow: bool) -> dict[str, int]:
    """What the kernel is compiled with."""
    return {"HEAD": size, "NARROW": int(is_narrow)}


def count_bytes(size: int) -> int:
    """Shared memory of a program: of each pair two times its queries, and keys and values."""
    box = _BOX * size * 2
    return _PAIRS * (4 * box + _STAGES[size] * 4 * box + 1024)


@cache
def _load(device: torch.device, size: int, is_narrow: bool) -> CudaKernel:
    return CudaKernel("attention_hopper", make_macros(size, is_narrow), device, _THREADS, count_bytes(size))
