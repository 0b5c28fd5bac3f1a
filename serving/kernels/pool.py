"""Pooling and L2 normalisation: the vectors that leave the GPU, and nothing else does."""

import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.add_norm import normalize_rows


@triton.jit
def _pool_kernel(
    x, offsets, weight, shift, out, hidden, eps,
    POOLING: tl.constexpr, NORM: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    if begin == end:  # an empty row: nobody reads its vector
        return
    columns = tl.arange(0, COLUMNS)
    inside = columns < hidden
    if POOLING == "mean":
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for top in tl.range(begin, end, ROWS):
            rows = top + tl.arange(0, ROWS)
            live = (rows < end)[:, None] & inside[None, :]
            state = tl.load(x + rows[:, None].to(tl.int64) * hidden + columns[None, :], live, other=0.0).to(tl.float32)
            if NORM:
                state = tl.where(live, normalize_rows(state, weight, shift, columns, hidden, eps), 0.0)
            acc += state
        vector = tl.sum(acc, axis=0) / (end - begin)
    else:
        row = begin if POOLING == "cls" else end - 1
        vector = tl.load(x + row.to(tl.int64) * hidden + columns, inside, other=0.0).to(tl.float32)
        if NORM:
            vector = tl.sum(normalize_rows(vector[None, :], weight, shift, columns, hidden, eps), axis=0)
    if NORMALIZE:
        vector = vector / tl.maximum(tl.sqrt(tl.sum(vector * vector, axis=0)), 1e-12)
    tl.store(out + sequence.to(tl.int64) * hidden + columns, vector, inside)


def pool(
    x: Tensor,
    offsets: Tensor,
    pooling: str,
    normalize: bool,
    out: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """See `reference.pool`: x [T, H], offsets int32 [B + 1], out float32 [B, H]; the vector of an empty
    sequence is not written. `norm` is a layer norm of x that is still to come: scale and shift [H], and epsilon."""
    columns = triton.next_power_of_2(x.shape[1])
    wide = columns > 512
    weight, shift, eps = norm or (x, x, 0.0)
    _pool_kernel[(len(out),)](
        x, offsets, weight, shift, out, x.shape[1], eps, POOLING=pooling, NORM=norm is not None, NORMALIZE=normalize,
        ROWS=16 if wide else 8, COLUMNS=columns, num_warps=8 if wide else 4,
    )  # fmt: skip
