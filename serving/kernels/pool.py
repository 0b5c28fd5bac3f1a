"""Pooling and L2 normalisation: the vectors that leave the GPU, and nothing else does."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pool_kernel(
    x, offsets, out, hidden,
    POOLING: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
            place = rows[:, None].to(tl.int64) * hidden + columns[None, :]
            acc += tl.load(x + place, (rows < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        vector = tl.sum(acc, axis=0) / (end - begin)
    else:
        row = begin if POOLING == "cls" else end - 1
        vector = tl.load(x + row.to(tl.int64) * hidden + columns, inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        vector = vector / tl.maximum(tl.sqrt(tl.sum(vector * vector, axis=0)), 1e-12)
    tl.store(out + sequence.to(tl.int64) * hidden + columns, vector, inside)


def pool(x: Tensor, offsets: Tensor, pooling: str, normalize: bool, out: Tensor) -> None:
    """See `reference.pool`: x [T, H], offsets int32 [B + 1], out float32 [B, H]; the vector of an empty
    sequence is not written."""
    columns = triton.next_power_of_2(x.shape[1])
    wide = columns > 512
    _pool_kernel[(len(out),)](
        x, offsets, out, x.shape[1], POOLING=pooling, NORMALIZE=normalize,
        ROWS=16 if wide else 8, COLUMNS=columns, num_warps=8 if wide else 4,
    )  # fmt: skip
