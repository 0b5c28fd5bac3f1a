"""Flash attention over packed sequences: online softmax, no score matrix, no padding.

A program takes a tile of packed rows wherever sequences begin and end, so that several short sequences share it. It
walks the keys from the beginning of its first row's sequence to the end of its last row's, and masks what belongs to
another sequence: nothing in blocks of keys of the sequence of all its rows, whole rows where a block's keys are of one
sequence, else key by key. A steady result takes the sequences of a tile one by one, each from its own beginning, so
that it has the same bits in any batch. Long texts on Hopper, and steady results there, have `attention_hopper`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from serving.kernels.handover import starts_early, take_over

LONG_LENGTH = 128  # tokens that one attends to, on average, from which the larger tile measured faster
# By head size and steadiness: stages of the ring of keys and values, and registers a thread where fewer than the
# compiler takes measured faster, because more programs share a processor.
_LIMITS = {(32, False): (3, 80), (32, True): (3, 80), (64, False): (3, None), (64, True): (2, 112)}
_FAR = tl.constexpr(-1.0e30)  # below every score, and finite: a row without a key in a block keeps its sums


@triton.jit
def _attend(q, k, v, m, total, acc, first, last, begin, is_apart, scale, BN: tl.constexpr, MASKED: tl.constexpr):
    """One block of keys at row `begin`: the running maximum, sum and weighted values after it. Where its keys are not
    `is_apart`, a row has all of them or none."""
    scores = tl.dot(q, k.T)
    if MASKED:
        if is_apart:
            rows = begin + tl.arange(0, BN)
            place, count = rows[None, :] - first[:, None], tl.maximum(last - first, 0)  # negative places are large ones
            own = place.to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)[:, None]
            scores = tl.where(own, scores, float("-inf"))
        owns = (first < begin + BN) & (last > begin)
        highest = tl.where(owns, tl.maximum(m, tl.max(scores, axis=1) * scale), m)
        weights = tl.exp2(scores * scale - tl.where(owns, highest, float("inf"))[:, None])
    else:
        highest = tl.maximum(m, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - highest[:, None])
    shrink = tl.exp2(m - highest)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return highest, total * shrink + tl.sum(weights, axis=1), acc


@triton.jit
def _walk(
    keys, q, m, total, acc, first, last, begin, end, whole, upper, lower, column, scale,
    HIDDEN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All blocks of keys from `begin` to `end`; the first `whole` keys belong to every row, those before `upper` and
    those from `lower` on to one sequence each."""
    for block in tl.range(begin, begin + whole, BN):
        k, v = keys.load([block, column + HIDDEN]), keys.load([block, column + 2 * HIDDEN])
        m, total, acc = _attend(q, k, v, m, total, acc, first, last, block, False, scale, BN, False)
    for block in tl.range(begin + whole, end, BN):
        k, v = keys.load([block, column + HIDDEN]), keys.load([block, column + 2 * HIDDEN])
        is_apart = (block + BN > upper) & ((block < lower) | (block + BN > end))
        m, total, acc = _attend(q, k, v, m, total, acc, first, last, block, is_apart, scale, BN, True)
    return m, total, acc


@triton.jit(do_not_specialize=["last"])
def _attention_kernel(
    queries, keys, starts, ends, out, out_factor, num_tokens, last, scale,
    HIDDEN: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QUANTIZE: tl.constexpr,
    STEADY: tl.constexpr, HANDOVER: tl.constexpr,
):  # fmt: skip
    if HANDOVER:
        take_over()
    column, place = tl.program_id(0) * D, tl.program_id(1)
    tile = tl.where(last < 0, place, last - place) * BM
    rows = tile + tl.arange(0, BM)
    live = rows < num_tokens
    bottom = tl.minimum(tile + BM, num_tokens) - 1
    first, last = tl.load(starts + rows, live, other=0), tl.load(ends + rows, live, other=0)
    begin, end = tl.load(starts + tile), tl.load(ends + bottom)
    whole = tl.where(begin == tl.load(starts + bottom), (end - begin) // BN * BN, 0)
    q = queries.load([tile, column])
    m, total, acc = tl.full([BM], _FAR, tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    if STEADY:
        while begin <= bottom:
            end = tl.load(ends + begin)
            until = tl.minimum(last, end)  # the last block reaches into the next sequence, whose turn is still to come
            m, total, acc = _walk(
                keys, q, m, total, acc, first, until, begin, end, whole, end, end, column, scale, HIDDEN, BN
            )
            begin = end
    else:
        upper, lower = tl.load(ends + tile), tl.load(starts + bottom)
        m, total, acc = _walk(
            keys, q, m, total, acc, first, last, begin, end, whole, upper, lower, column, scale, HIDDEN, BN
        )
    acc = acc / tl.maximum(total, 1e-30)[:, None]  # rows past the end saw no key
    if QUANTIZE:
        acc = tl.clamp(acc * tl.load(out_factor), -448.0, 448.0)
    place = rows[:, None].to(tl.int64) * HIDDEN + column + tl.arange(0, D)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), live[:, None])


def attention(
    qkv: Tensor, starts: Tensor, ends: Tensor, heads: int, out: Tensor, out_factor: Tensor | None = None,
    is_long: bool = False, is_steady: bool = False, is_upward: bool = True,
) -> None:  # fmt: skip
    """See `reference.attention`: qkv [T, 3H], starts and ends int32 [T] ascending, out [T, H].

    With `out_factor` (float32 [1]) out is E4M3 and takes the result times it. `is_long` chooses the tile
    that measured faster from LONG_LENGTH on; a sequence's result has the same bits wherever it lies
    if it `is_steady`. `is_upward` begins with the last rows, which whoever wrote qkv downward left in the second cache.
    Head sizes: those of `serving.kernels`.
    """
    num_tokens, hidden = out.shape
    size, is_early = hidden // heads, starts_early(qkv)
    rows, keys = 64, 64 if is_long or is_steady else 32
    scale, (stages, registers) = math.log2(math.e) / math.sqrt(size), _LIMITS[size, is_steady]
    down = triton.cdiv(num_tokens, rows)
    _attention_kernel[(heads, down)](
        TensorDescriptor.from_tensor(qkv, [rows, size]), TensorDescriptor.from_tensor(qkv, [keys, size]),
        starts, ends, out, out_factor, num_tokens, down - 1 if is_upward else -1, scale,
        HIDDEN=hidden, D=size, BM=rows, BN=keys, QUANTIZE=out_factor is not None, STEADY=is_steady,
        HANDOVER=is_early, num_warps=4, num_stages=stages, maxnreg=registers, launch_pdl=is_early,
    )  # fmt: skip
