"""GEMM of normalised rows for Hopper (capability 9.0) in CUDA C++: see gemm_wide.cu.

Faster than `gemm_hopper` where that one has to stream its weights: Triton has no tiles of 192 columns.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from serving.kernels.compiled import CudaKernel, TensorMap
from serving.kernels.gemm import is_hopper
from serving.kernels.handover import starts_early

COLUMNS = 192  # of a tile, and of what each pair of sums is over
_ROWS, _STEP, _PIECE = 128, 64, 64
_LEAST_DEPTH = 512  # below it `gemm_hopper` keeps its weights in shared memory, which measured faster
_THREADS, _SHARED_BYTES = 384, 227 * 1024


class _Argument(ctypes.Structure):
    """`Argument` of the kernel."""

    _fields_ = [
        *((name, TensorMap) for name in ("x", "weight", "out", "residual")),
        *((name, ctypes.c_void_p) for name in ("bias", "scales", "sums", "out_sums")),
        *((name, ctypes.c_float) for name in ("eps", "share")),
        *((name, ctypes.c_int) for name in ("num_rows", "tiles", "across", "last", "depth", "parts")),
    ]


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes a weight [N, K], and is the faster one for it."""
    columns, depth = weight.shape
    if weight.dtype != torch.float16 or not is_hopper(weight.device):
        return False
    return columns % COLUMNS == 0 and depth % _STEP == 0 and depth >= _LEAST_DEPTH


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, num_programs: int, sums: Tensor, eps: float,
    gelu: bool = False, is_upward: bool = False,
) -> None:  # fmt: skip
    """norm(x) @ weight.T + bias, with GELU when `gelu`: x [T, K], weight [N, K], bias [N], out [T, N], all float16.

    The norm's scale is in the weight, whose rows sum to 0, and its shift in the bias. `sums` (float32 [T, parts, 2]):
    sum and sum of squares of each row of x, in parts. `num_programs`: multiprocessors. `is_upward` begins with the
    last rows: those that whoever wrote x downward left in the second cache. Raises CompileFailed.
    """
    kernel = _load(x.device, False, gelu)
    _launch(kernel, x.shape[1], x, weight, bias, out, num_programs, sums, eps, is_upward)


def add(
    x: Tensor, weight: Tensor, bias: Tensor, total: Tensor, num_programs: int, sums: Tensor, scale: Tensor, eps: float,
    out_sums: Tensor, is_upward: bool = False,
) -> None:  # fmt: skip
    """total = norm(total) + x @ weight.T + bias in place: x [T, K], weight [N, K], bias [N], total [T, N].

    `scale` (float16 [N]) is the norm's; its shift is in the bias. `sums` as of `linear`, of `total`; `out_sums`
    (float32 [T, N / COLUMNS, 2]) takes those of the result. Raises CompileFailed.
    """
    kernel = _load(x.device, True, False)
    num_programs -= num_programs % (len(weight) // COLUMNS)  # a program keeps its column
    _launch(kernel, total.shape[1], x, weight, bias, total, num_programs, sums, eps, is_upward, scale, out_sums)


def prepare(device: torch.device) -> None:
    """Compile all forms, beside each other. Raises CompileFailed."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_load, device), (True, False, False), (False, False, True)))


@cache
def _load(device: torch.device, adds: bool, gelu: bool) -> CudaKernel:
    return CudaKernel("gemm_wide", {"RESIDUAL": int(adds), "GELU": int(gelu)}, device, _THREADS, _SHARED_BYTES)


def _launch(
    kernel: CudaKernel, hidden: int, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, num_programs: int,
    sums: Tensor, eps: float, is_upward: bool, scale: Tensor | None = None, out_sums: Tensor | None = None,
) -> None:  # fmt: skip
    (num_rows, depth), across = x.shape, len(weight) // COLUMNS
    down = -(-num_rows // _ROWS)
    pieces = TensorMap.of(out, _ROWS, _PIECE)
    pointers: list[Any] = [None if each is None else each.data_ptr() for each in (bias, scale, sums, out_sums)]
    argument = _Argument(
        TensorMap.of(x, _ROWS, _STEP), TensorMap.of(weight, COLUMNS, _STEP), pieces, pieces, *pointers,
        eps, 1 / hidden, num_rows, down * across, across, down - 1 if is_upward else -1, depth // _STEP, sums.shape[1],
    )  # fmt: skip
    kernel.launch(argument, min(num_programs, down * across), starts_early(x))
