"""Linear layer with GELU and E4M3 scales in its epilogue: one op, the fastest kernel for the shape and the GPU.

Many rows on Hopper go to the ping-pong kernel of `gemm_hopper`; every other GPU, and few rows, to the Triton kernel
here; a plain float16 layer of few rows to cuBLAS, which measured faster there.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MANY_ROWS = 2048  # from here on tiles of 128 x 128 fill the GPU
_HOPPER = 9
_LARGE_SHARED_BYTES = 200_000
# x / 2 (1 + tanh(x (A + B x²))) is the GELU, x Φ(x), to 4.5e-4, and where x is normally distributed to 1.7e-4 of its
# norm: half of what float16 takes from the result.
_A, _B = tl.constexpr(0.79862082), tl.constexpr(0.0355207)


@triton.jit
def gelu(x, FAST: tl.constexpr):
    """x Φ(x) of float32 x; FAST uses the hardware's tanh, otherwise erf."""
    if FAST:
        half = 0.5 * x
        inner = half * (2.0 * _A + half * half * (8.0 * _B))
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
        )
        value = half + half * tanh
    else:
        value = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return value


@triton.jit
def _linear_kernel(
    x, weight, out, bias, x_scales, weight_scale, out_factor, num_rows, num_columns, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
    GELU: tl.constexpr, SCALES: tl.constexpr, QUANTIZE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(num_columns, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BM) * across, PROGRAMS, flatten=True):
        top, left = tile // across * BM, tile % across * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, depth, BK):
            acc = tl.dot(x.load([top, k]), weight.load([left, k]).T, acc)
        if SCALES:
            rows = top + tl.arange(0, BM)
            acc *= (tl.load(x_scales + rows, rows < num_rows, other=0.0) * tl.load(weight_scale))[:, None]
        columns = left + tl.arange(0, BN)
        acc += tl.load(bias + columns, columns < num_columns, other=0.0).to(tl.float32)[None, :]
        if GELU:
            acc = gelu(acc, FAST)
        if QUANTIZE:
            acc = tl.clamp(acc * tl.load(out_factor), -448.0, 448.0)
        out.store([top, left], acc.to(out.dtype))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gelu: bool = False, x_scales: Tensor | None = None,
    weight_scale: Tensor | None = None, out_factor: Tensor | None = None, is_steady: bool = False,
) -> None:  # fmt: skip
    """x @ weight.T + bias, with GELU when `gelu`: x [T, K], weight [N, K], bias [N], out [T, N].

    E4M3 operands bring `x_scales` (float32 [T]) and `weight_scale` ([1]), which multiply the product; with
    `out_factor` ([1]) `out` is E4M3 and takes the result times it. K and N are multiples of 128. On Hopper a row's
    result has the same bits among any number of rows if it `is_steady`.
    """
    device = _read_device(x.device.index) if x.is_cuda else None
    if device and device.major == _HOPPER and (is_steady or len(x) >= MANY_ROWS):
        from serving.kernels import gemm_hopper  # noqa: PLC0415  Gluon loads only where it can run

        gemm_hopper.linear(
            x, weight, bias, out, device.multi_processor_count, gelu, None, x_scales, weight_scale, out_factor
        )
    elif x_scales is None and not gelu:
        torch.addmm(bias, x, weight.t(), out=out)
    else:
        _launch(x, weight, bias, out, gelu, x_scales, weight_scale, out_factor, device)


def is_hopper(device: torch.device) -> bool:
    """Whether this is a GPU for the kernels that need Hopper."""
    return count_hopper_processors(device) > 0


def count_hopper_processors(device: torch.device) -> int:
    """Multiprocessors of such a GPU; 0 of any other device."""
    properties = _read_device(device.index) if device.type == "cuda" else None
    return int(properties.multi_processor_count) if properties and properties.major == _HOPPER else 0


def add_product(
    x: Tensor, weight: Tensor, total: Tensor, x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
    is_steady: bool = False,
) -> None:  # fmt: skip
    """total += x @ weight.T, in place: x [T, K], weight [N, K], total float16 [T, N]; E4M3 brings scales [1].

    `is_steady`: see `linear`.
    """
    device = _read_device(x.device.index) if x.is_cuda else None
    is_many = x_scale is not None and len(x) >= MANY_ROWS
    if device and device.major == _HOPPER and (is_steady or is_many):
        from serving.kernels import gemm_hopper  # noqa: PLC0415  Gluon loads only where it can run

        gemm_hopper.linear(
            x, weight, None, total, device.multi_processor_count, residual=total, x_scales=x_scale,
            weight_scale=weight_scale,
        )  # fmt: skip
    elif x_scale is None or weight_scale is None:
        total.addmm_(x, weight.t())
    else:
        total += torch._scaled_mm(
            x, weight.t(), x_scale[0], weight_scale[0], out_dtype=total.dtype, use_fast_accum=True
        )


def _launch(x, weight, bias, out, gelu, x_scales, weight_scale, out_factor, device):
    (num_rows, depth), columns = x.shape, weight.shape[0]
    few = num_rows < MANY_ROWS
    large = device is not None and device.shared_memory_per_block_optin >= _LARGE_SHARED_BYTES
    rows_tile, columns_tile = (64, 64) if few else (128, 256) if large else (128, 128)
    step = 64 if few or large else 32
    programs = min(
        device.multi_processor_count * (2 if few else 1) if device else 2,
        triton.cdiv(num_rows, rows_tile) * triton.cdiv(columns, columns_tile),
    )
    _linear_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [rows_tile, step]), TensorDescriptor.from_tensor(weight, [columns_tile, step]),
        TensorDescriptor.from_tensor(out, [rows_tile, columns_tile]), bias, x_scales, weight_scale, out_factor,
        num_rows, columns, depth, BM=rows_tile, BN=columns_tile, BK=step, PROGRAMS=programs, GELU=gelu,
        SCALES=x_scales is not None, QUANTIZE=out_factor is not None, FAST=x.is_cuda,
        num_warps=4 if few else 8, num_stages=4 if few else 3,
    )  # fmt: skip


@cache
def _read_device(index: int) -> Any:
    return torch.cuda.get_device_properties(index)
