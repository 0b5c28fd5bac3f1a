"""Embedding lookup and the layer norm behind it in one pass: no sum is ever written."""

import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.add_norm import scale_rows, standardize_rows, store_narrow

_ROWS = 2
_NARROW = 512  # columns of which one warp measured faster than two


@triton.jit
def _embed_norm_kernel(
    ids, starts, words, positions, weight, bias, out, quantized, scales, num_tokens, hidden, eps,
    QUANTIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    live = rows < num_tokens
    inside = live[:, None] & (columns < hidden)[None, :]
    word = tl.load(ids + rows, live, other=0)
    place = tl.where(live, rows - tl.load(starts + rows, live, other=0), 0)
    x = tl.load(words + word[:, None] * hidden + columns[None, :], inside, other=0.0).to(tl.float32)
    x += tl.load(positions + place[:, None] * hidden + columns[None, :], inside, other=0.0).to(tl.float32)
    x = scale_rows(standardize_rows(x, columns, hidden, eps), weight, bias, columns, hidden)
    target = rows[:, None].to(tl.int64) * hidden + columns[None, :]
    tl.store(out + target, x.to(out.dtype.element_ty), inside)
    if QUANTIZE:
        store_narrow(x, quantized, scales, rows, target, inside, num_tokens)


def embed_norm(
    ids: Tensor,
    starts: Tensor,
    words: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor,
    quantized: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """See `reference.embed_norm`: ids, starts int32 [T]; words [V, H]; positions [P, H] (type 0 added); out [T, H].

    With `scales` (float32 [T], written here) `quantized` (E4M3 [T, H]) takes the result, each row divided by its scale.
    """
    num_tokens, hidden = out.shape
    _embed_norm_kernel[(triton.cdiv(num_tokens, _ROWS),)](
        ids, starts, words, positions, weight, bias, out, quantized, scales, num_tokens, hidden, eps,
        QUANTIZE=scales is not None, ROWS=_ROWS, COLUMNS=triton.next_power_of_2(hidden),
        num_warps=1 if hidden <= _NARROW else 2,
    )  # fmt: skip
