"""Pooling and L2 normalisation: the vectors that leave the GPU, and nothing else does."""

import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.handover import starts_early, take_over

Norm = tuple[Tensor, Tensor, Tensor, float]
_ROWS, _COLUMNS = 32, 64  # that a program, one warp, has at a time: sequences are few, so several share one's columns


@triton.jit
def _find_norms(sums, rows, live, eps, HIDDEN: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean times spread, and spread of rows, from the sums over parts of their columns; 0 where there is no row."""
    parts = tl.arange(0, WIDTH)
    inside = live[:, None] & (parts < 2 * PARTS)[None, :]
    own = tl.load(sums + rows[:, None] * (2 * PARTS) + parts[None, :], inside, other=0.0) / HIDDEN
    mean, square = tl.split(tl.sum(own.reshape([rows.shape[0], WIDTH // 2, 2]), axis=1))
    spread = tl.where(live, tl.rsqrt(square - mean * mean + eps), 0.0)
    return mean * spread, spread


@triton.jit
def _scale_to_one(vector, HIDDEN: tl.constexpr, ALL: tl.constexpr):
    """The vector in memory to length 1."""
    columns = tl.arange(0, ALL)
    inside = columns < HIDDEN
    values = tl.load(vector + columns, inside, other=0.0)
    tl.store(vector + columns, values / tl.maximum(tl.sqrt(tl.sum(values * values, axis=0)), 1e-12), inside)


@triton.jit(do_not_specialize=["last"])
def _pool_kernel(
    x, offsets, sums, weight, shift, out, done, last, eps, HIDDEN: tl.constexpr,
    POOLING: tl.constexpr, NORM: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr, ALL: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, HANDOVER: tl.constexpr,
):  # fmt: skip
    if HANDOVER:
        take_over()
    number, across = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    sequence = tl.where(last < 0, number, last - number)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    if begin == end:  # an empty row: nobody reads its vector
        return
    columns = across * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    first = end - 1 if POOLING == "lasttoken" else begin
    count = 1 if POOLING != "mean" else end - begin
    states, own_sums = x + first.to(tl.int64) * HIDDEN, sums + first.to(tl.int64) * (2 * PARTS)
    acc, means = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS], tl.float32)
    for top in range(0, count, ROWS):
        rows = top + tl.arange(0, ROWS)
        live = rows < count
        place = rows[:, None] * HIDDEN + columns[None, :]
        state = tl.load(states + place, live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if NORM:
            mean, spread = _find_norms(own_sums, rows, live, eps, HIDDEN, PARTS, WIDTH)
            means += mean
            acc += state * spread[:, None]
        else:
            acc += state
    vector = (tl.sum(acc, axis=0) - tl.sum(means, axis=0)) / count
    if NORM:
        scale = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
        vector = vector * scale + tl.load(shift + columns, inside, other=0.0).to(tl.float32)
    target = out + sequence.to(tl.int64) * HIDDEN
    tl.store(target + columns, vector, inside)
    if NORMALIZE:
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(done + sequence, 1) == ACROSS - 1:
            _scale_to_one(target, HIDDEN, ALL)
            tl.store(done + sequence, 0)


def pool(
    x: Tensor,
    offsets: Tensor,
    pooling: str,
    normalize: bool,
    out: Tensor,
    done: Tensor,
    norm: Norm | None = None,
    is_upward: bool = True,
) -> None:
    """See `reference.pool`: x [T, H], offsets int32 [B + 1], out float32 [B, H]; the vector of an empty
    sequence is not written.

    `done`: int32 of at least B, zeros before and after, for no other run meanwhile: how many programs have written
    their columns of a vector, which the last of them brings to length 1. `norm` is a layer norm of x that is still to
    come: float32 sums and sums of squares over parts of its columns [T, parts, 2], scale and shift [H], epsilon.
    `is_upward` begins with the last sequences, which whoever wrote x downward left in the second cache.
    """
    hidden = x.shape[1]
    across, is_early = triton.cdiv(hidden, _COLUMNS), starts_early(x)
    sums, weight, shift, eps = norm or (x, x, x, 0.0)
    parts = 1 if norm is None else sums.shape[1]
    _pool_kernel[(len(out) * across,)](
        x, offsets, sums, weight, shift, out, done, len(out) - 1 if is_upward else -1, eps, HIDDEN=hidden,
        POOLING=pooling, NORM=norm is not None, NORMALIZE=normalize, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=1,
        ACROSS=across, ALL=triton.next_power_of_2(hidden), PARTS=parts, WIDTH=2 * triton.next_power_of_2(parts),
        HANDOVER=is_early, launch_pdl=is_early,
    )  # fmt: skip
