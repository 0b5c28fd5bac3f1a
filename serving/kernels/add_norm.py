"""Residual, bias and layer norm in one pass over the rows, in E4M3 as well where that is asked for."""

import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.handover import starts_early, take_over

_ROWS = 2
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def standardize_rows(x, columns, hidden, eps):
    """Float32 rows of mean 0 and spread 1; columns from `hidden` on hold zeros and stay out of the statistics."""
    mean = tl.sum(x, axis=1) / hidden
    centered = tl.where((columns < hidden)[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / hidden
    return centered * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def scale_rows(standard, weight, shift, columns, hidden):
    """What is left of the layer norm."""
    scale = tl.load(weight + columns, columns < hidden, other=0.0).to(tl.float32)
    moved = tl.load(shift + columns, columns < hidden, other=0.0).to(tl.float32)
    return standard * scale[None, :] + moved[None, :]


@triton.jit
def store_narrow(values, quantized, scales, rows, place, inside, num_tokens):
    """Write rows in E4M3 by a scale a row, which is written too."""
    scale = tl.maximum(tl.max(tl.where(inside, tl.abs(values), 0.0), axis=1) / E4M3_MAX, 1e-12)
    tl.store(scales + rows, scale, rows < num_tokens)
    tl.store(quantized + place, (values / scale[:, None]).to(quantized.dtype.element_ty), inside)


@triton.jit
def _add_norm_kernel(
    x, residual, bias, weight, shift, out, quantized, scales, num_tokens, hidden, eps,
    RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HANDOVER: tl.constexpr,
):  # fmt: skip
    if HANDOVER:
        take_over()
    # From the last rows on, which whoever wrote x left in the second cache.
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_tokens)[:, None] & (columns < hidden)[None, :]
    place = rows[:, None].to(tl.int64) * hidden + columns[None, :]
    summed = tl.load(x + place, inside, other=0.0).to(tl.float32)
    summed += tl.load(bias + columns, columns < hidden, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        summed += tl.load(residual + place, inside, other=0.0).to(tl.float32)
    standard = standardize_rows(summed, columns, hidden, eps)
    normed = scale_rows(standard, weight, shift, columns, hidden)
    tl.store(out + place, normed.to(out.dtype.element_ty), inside)
    if QUANTIZE:
        store_narrow(standard, quantized, scales, rows, place, inside, num_tokens)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    out: Tensor,
    quantized: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """See `reference.add_norm`: x, residual, out [T, H], where `out` may be `x` or `residual`; the others [H].

    With `scales` (float32 [T], written here) `quantized` (E4M3 [T, H]) takes the rows before `weight` and `shift`, each
    divided by its scale.
    """
    num_tokens, hidden = x.shape
    columns, is_early = triton.next_power_of_2(hidden), starts_early(x)
    _add_norm_kernel[(triton.cdiv(num_tokens, _ROWS),)](
        x, x if residual is None else residual, bias, weight, shift, out, quantized, scales, num_tokens, hidden, eps,
        RESIDUAL=residual is not None, QUANTIZE=scales is not None,
        ROWS=_ROWS, COLUMNS=columns, HANDOVER=is_early, num_warps=2, launch_pdl=is_early,
    )  # fmt: skip
