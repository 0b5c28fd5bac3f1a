"""Pooling and L2 normalisation: the vectors that leave the GPU, and nothing else does."""

import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.handover import starts_early, take_over

Norm = tuple[Tensor, Tensor, Tensor, float]


@triton.jit
def _normalize(state, rows, live, sums, eps, HIDDEN: tl.constexpr, PARTS: tl.constexpr):
    """Rows by mean and spread, from the sums over parts of their columns."""
    mean, square = tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.float32)
    for part in tl.static_range(PARTS):
        place = sums + (rows.to(tl.int64) * PARTS + part) * 2
        mean += tl.load(place, live, other=0.0) / HIDDEN
        square += tl.load(place + 1, live, other=0.0) / HIDDEN
    return (state - mean[:, None]) * tl.rsqrt(square - mean * mean + eps)[:, None]


@triton.jit(do_not_specialize=["last"])
def _pool_kernel(
    x, offsets, sums, weight, shift, out, last, eps, HIDDEN: tl.constexpr,
    POOLING: tl.constexpr, NORM: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, HANDOVER: tl.constexpr,
):  # fmt: skip
    if HANDOVER:
        take_over()
    sequence = tl.where(last < 0, tl.program_id(0), last - tl.program_id(0))
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    if begin == end:  # an empty row: nobody reads its vector
        return
    columns = tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    first = end - 1 if POOLING == "lasttoken" else begin
    until = begin + 1 if POOLING == "cls" else end
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for top in tl.range(first, until, ROWS, num_stages=2):  # the next rows are on their way: long sequences wait less
        rows = top + tl.arange(0, ROWS)
        live = rows < until
        place = rows[:, None].to(tl.int64) * HIDDEN + columns[None, :]
        state = tl.load(x + place, live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if NORM:
            state = tl.where(live[:, None], _normalize(state, rows, live, sums, eps, HIDDEN, PARTS), 0.0)
        acc += state
    vector = tl.sum(acc, axis=0) / (until - first)
    if NORM:
        scale = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
        vector = vector * scale + tl.load(shift + columns, inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        vector = vector / tl.maximum(tl.sqrt(tl.sum(vector * vector, axis=0)), 1e-12)
    tl.store(out + sequence.to(tl.int64) * HIDDEN + columns, vector, inside)


def pool(
    x: Tensor,
    offsets: Tensor,
    pooling: str,
    normalize: bool,
    out: Tensor,
    norm: Norm | None = None,
    is_upward: bool = True,
) -> None:
    """See `reference.pool`: x [T, H], offsets int32 [B + 1], out float32 [B, H]; the vector of an empty
    sequence is not written.

    `norm` is a layer norm of x that is still to come: float32 sums and sums of squares over parts of its columns
    [T, parts, 2], scale and shift [H], epsilon. `is_upward` begins with the last sequences, which whoever wrote x
    downward left in the second cache.
    """
    hidden = x.shape[1]
    columns = triton.next_power_of_2(hidden)
    is_early = starts_early(x)
    sums, weight, shift, eps = norm or (x, x, x, 0.0)
    _pool_kernel[(len(out),)](
        x, offsets, sums, weight, shift, out, len(out) - 1 if is_upward else -1, eps, HIDDEN=hidden,
        POOLING=pooling, NORM=norm is not None, NORMALIZE=normalize,
        ROWS=8 if columns > 512 else 16, COLUMNS=columns, num_warps=4,
        PARTS=1 if norm is None else sums.shape[1], HANDOVER=is_early, launch_pdl=is_early,
    )  # fmt: skip
