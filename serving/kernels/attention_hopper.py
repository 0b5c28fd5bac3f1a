"""Flash attention over packed sequences for Hopper (capability 9.x), heads of 64: `attention` says what.

One warp feeds a ring of blocks of keys and values through the copy engine; four warpgroups with a tile of 64 rows each
share it. Their tiles are neighbours, so a block is read once for all of them, and while some take exponentials others
multiply. A program walks the keys of all its tiles, from the beginning of the first row's sequence to the end of the
last row's; a warpgroup passes over blocks in which its tile has no part. A steady result takes sequences one by one.

Barriers: `ready` and `empty` of each ring stage, `asked` and `answered` of the two sets of queries. A warpgroup waits
for each fill of the ring and releases it, those that it passes over too: so nobody is two fills ahead of anybody, where
a barrier's parity says nothing, and what is released was filled.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEAD_SIZE = 64
_FAR = gl.constexpr(-1.0e30)  # below every score, and finite: a row without a key in a block keeps its sums
_ROWS = gl.constexpr(64)  # of a warpgroup's tile
_GROUPS = gl.constexpr(4)  # warpgroups with tiles
_ALL_ROWS = gl.constexpr(256)
_STEP = gl.constexpr(64)  # keys of a block
_STAGES = gl.constexpr(8)
_REGISTERS, _SHARE = 96, gl.constexpr(112)  # a thread at the launch, and of those who multiply
_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # triton 3.7 renamed it


@gluon.jit
def _find_tiles(turn, sizes, HEADS: gl.constexpr, D: gl.constexpr):
    """Top row and left column of this program's tiles; heads first, so that rows are read whole by those who run."""
    _, last, _ = sizes
    item = gl.program_id(0) + turn * gl.num_programs(0)
    group = item // HEADS
    return gl.where(last < 0, group, last - group) * _ALL_ROWS, item % HEADS * D


@gluon.jit
def _read_range(bounds, top, num_tokens, COUNT: gl.constexpr):
    """First and last of COUNT rows from `top`, begin of the first's sequence, end of the last's. Rows past the end
    count as the last one: nobody reads what they get."""
    starts, ends = bounds
    first = gl.maximum(gl.minimum(top, num_tokens - 1), 0)
    last = gl.maximum(gl.minimum(top + COUNT, num_tokens) - 1, first)
    return first, last, gl.load(starts + first), gl.load(ends + last)


@gluon.jit
def _fill_blocks(keys, ring, barriers, fill, block, until, column, HIDDEN: gl.constexpr):
    """Blocks of keys and values from row `block` to `until`, as fills from `fill` on; the fill after them.

    Not a `for`: triton (3.6, 3.7) takes what an outer loop carries and only the range of an inner `for` uses for dead,
    and every turn would have the first one's range.
    """
    ready, empty, _, _ = barriers
    k_ring, v_ring = ring
    while block < until:
        slot = fill % _STAGES
        bar = ready.index(slot)
        mbarrier.wait(empty.index(slot), (fill // _STAGES & 1) ^ 1)
        mbarrier.expect(bar, 2 * keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, [block, column + HIDDEN], bar, k_ring.index(slot))
        tma.async_copy_global_to_shared(keys, [block, column + 2 * HIDDEN], bar, v_ring.index(slot))
        fill += 1
        block += _STEP
    return fill


@gluon.jit
def _produce(queries, keys, bounds, ring, tiles, barriers, sizes, HEADS: gl.constexpr, STEADY: gl.constexpr):
    """Queries, keys and values of every item of this program, in the order in which they are used."""
    _, _, asked, answered = barriers
    count, _, num_tokens = sizes
    _, ends = bounds
    size: gl.constexpr = keys.block_type.shape[1]
    fill = gl.to_tensor(0)
    gdc_wait()
    top, column = _find_tiles(0, sizes, HEADS, size)
    _, last, begin, end = _read_range(bounds, top, num_tokens, _ALL_ROWS)
    for turn in range(count):
        bar = asked.index(turn & 1)
        mbarrier.wait(answered.index(turn & 1), (turn >> 1 & 1) ^ 1)
        mbarrier.expect(bar, _GROUPS * queries.block_type.nbytes)
        for number in gl.static_range(_GROUPS):
            place = (turn & 1) * _GROUPS + number
            tma.async_copy_global_to_shared(queries, [top + number * _ROWS, column], bar, tiles.index(place))
        here, bottom, until, left = begin, last, end, column
        top, column = _find_tiles(turn + 1, sizes, HEADS, size)
        _, last, begin, end = _read_range(bounds, top, num_tokens, _ALL_ROWS)  # meanwhile
        if STEADY:
            until = gl.load(ends + here)
            while here <= bottom:
                following = gl.load(ends + gl.minimum(until, num_tokens - 1))
                fill = _fill_blocks(keys, ring, barriers, fill, here, until, left, HEADS * size)
                here, until = until, following
        else:
            fill = _fill_blocks(keys, ring, barriers, fill, here, until, left, HEADS * size)


@gluon.jit
def _pass_over(barriers, fill, count):
    """Release `count` fills unseen. All warps have seen one before it is released, else the last could see the next."""
    ready, empty, _, _ = barriers
    behind = fill + count
    while fill < behind:  # not a `for`: see _fill_blocks
        mbarrier.wait(ready.index(fill % _STAGES), fill // _STAGES & 1)
        _meet()
        mbarrier.arrive(empty.index(fill % _STAGES), count=1)
        fill += 1
    return behind


@gluon.jit
def _mask(scores, block, first, until, layout: gl.constexpr):
    """Scores of a block of keys from row `block`, without those of keys before `first` or from `until` on.

    Columns are taken apart into what differs by register and what differs by thread: so the first are constants, where
    the compiler would keep all columns in registers.
    """
    parts = scores.reshape([_ROWS, _STEP // 8, 4, 2])
    apart: gl.constexpr = parts.type.layout
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, apart)))
    of_threads: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, apart)))
    of_eights: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, apart)))
    of_pairs: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, apart)))
    begin = gl.convert_layout(block - first, of_rows, assert_trivial=True)
    count = gl.convert_layout(gl.maximum(until - first, 0), of_rows, assert_trivial=True).to(gl.uint32, bitcast=True)
    threads = gl.arange(0, 4, layout=of_threads) * 2
    place = begin[:, None, None, None] + threads[None, None, :, None]
    place += (gl.arange(0, _STEP // 8, layout=of_eights) * 8)[None, :, None, None]
    place += gl.arange(0, 2, layout=of_pairs)[None, None, None, :]  # negative places are large ones
    own = place.to(gl.uint32, bitcast=True) < count[:, None, None, None]
    kept = gl.where(own, parts, float("-inf")).reshape([_ROWS, _STEP])
    return gl.convert_layout(kept, layout, assert_trivial=True)


@gluon.jit
def _weigh(scores, own, m, total, acc, scale, layout: gl.constexpr):
    """Weights of a block as an operand, none in rows that do not `own` a key of it; the running maximum, sum and
    weighted values before they are added."""
    highest = gl.where(own, gl.maximum(m, gl.max(scores, axis=1) * scale), m)
    weights = gl.exp2(scores * scale - gl.expand_dims(gl.where(own, highest, float("inf")), 1))
    shrink = gl.exp2(m - highest)
    total = total * shrink + gl.sum(weights, axis=1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, layout))
    operand = gl.convert_layout(weights.to(gl.float16), gl.DotOperandLayout(0, layout, 2))
    return operand, highest, total, acc * gl.expand_dims(shrink, 1)


@gluon.jit
def _walk(
    q, ring, barriers, fill, state, first, until, row, count, inside, scale, score_layout: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """`count` blocks of keys from row `row`, fills from `fill` on. Keys of blocks `inside` two spans, from one to
    before another, are of one sequence each: a row has all of them or none."""
    ready, empty, _, _ = barriers
    k_ring, v_ring = ring
    m, total, acc = state
    upper_from, upper_to, lower_from, lower_to = inside
    for k in range(count):
        slot, block = (fill + k) % _STAGES, row + k * _STEP
        mbarrier.wait(ready.index(slot), (fill + k) // _STAGES & 1)
        none = gl.zeros([_ROWS, _STEP], gl.float32, score_layout)
        scores = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        if ((k < upper_from) | (k >= upper_to)) & ((k < lower_from) | (k >= lower_to)):
            scores = _mask(scores, block, first, until, score_layout)
        own = (first < block + _STEP) & (until > block)
        weights, m, total, acc = _weigh(scores, own, m, total, acc, scale, layout)
        acc = warpgroup_mma(weights, v_ring.index(slot), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(empty.index(slot), count=1)
    return fill + count, (m, total, acc)


@gluon.jit
def _count_blocks(bounds, top, tile, num_tokens):
    """Blocks of the sequences of all tiles that are over before row `tile`, and of all."""
    starts, ends = bounds
    layout: gl.constexpr = gl.BlockedLayout([_ALL_ROWS // 128], [32], [4], [0])
    place = gl.arange(0, _ALL_ROWS, layout=layout)
    rows = top + place
    live = rows < num_tokens
    begin, end = gl.load(starts + rows, live, other=0), gl.load(ends + rows, live, other=0)
    number = gl.where((begin == rows) | (place == 0), (end - begin + (_STEP - 1)) // _STEP, 0)
    number = gl.where(live, number, 0)
    both = gl.sum(number + gl.where(end <= tile, number, 0) * 65536, axis=0)
    return both >> 16, both & 65535


@gluon.jit
def _attend_steadily(
    q, ring, barriers, fill, state, first, until, own, top, bounds, num_tokens, scale, score_layout: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """All fills of an item, sequence by sequence."""
    tile, bottom, begin, _ = own
    _, ends = bounds
    before, blocks = _count_blocks(bounds, top, tile, num_tokens)
    behind = fill + blocks
    fill = _pass_over(barriers, fill, before)
    while begin <= bottom:
        end = gl.load(ends + begin)
        seen = gl.minimum(until, end)  # the last block reaches into the next sequence, whose turn is to come
        inside = (0, (end - begin) // _STEP, 0, 0)
        fill, state = _walk(
            q, ring, barriers, fill, state, first, seen, begin, (end - begin + (_STEP - 1)) // _STEP, inside, scale,
            score_layout, layout,
        )  # fmt: skip
        begin = end
    return fill, behind - fill, state


@gluon.jit
def _attend(
    q, ring, barriers, fill, state, first, until, own, everyone, bounds, scale, score_layout: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """The tile's own fills of an item, behind those of the tiles before it; how many are left."""
    tile, bottom, begin, end = own
    starts, ends = bounds
    all_from, all_to = everyone
    before, behind = (begin - all_from) // _STEP, (end - all_from + (_STEP - 1)) // _STEP
    upper_from = (begin - all_from + (_STEP - 1)) // _STEP - before
    upper_to = (gl.load(ends + tile) - all_from) // _STEP - before
    lower_from = (gl.load(starts + bottom) - all_from + (_STEP - 1)) // _STEP - before
    inside = (upper_from, upper_to, lower_from, (end - all_from) // _STEP - before)
    fill = _pass_over(barriers, fill, before)
    fill, state = _walk(
        q, ring, barriers, fill, state, first, until, all_from + before * _STEP, behind - before, inside, scale,
        score_layout, layout,
    )  # fmt: skip
    return fill, (all_to - all_from + (_STEP - 1)) // _STEP - behind, state


@gluon.jit
def _send(state, factor, out, buffer, top, column, layout: gl.constexpr, QUANTIZE: gl.constexpr):
    """Write a tile; the copy engine leaves out rows past the end."""
    _, total, acc = state
    share = 1.0 / gl.maximum(total, 1e-30)  # rows past the end saw no key
    acc = acc * gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, layout)), 1)
    if QUANTIZE:
        acc = acc * factor  # the conversion cuts what is beyond E4M3
    tma.store_wait(0)
    _meet()
    buffer.store(acc.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [top, column], buffer)


@gluon.jit
def _begin_tile(bounds, top, num_tokens, scored: gl.constexpr, layout: gl.constexpr, D: gl.constexpr):
    """Bounds of the rows' sequences; maximum, sum and weighted values of no keys."""
    starts, ends = bounds
    of_row: gl.constexpr = gl.SliceLayout(1, scored)
    rows = top + gl.arange(0, _ROWS, layout=of_row)
    first = gl.load(starts + rows, rows < num_tokens, other=0)
    until = gl.load(ends + rows, rows < num_tokens, other=0)
    m, total = gl.full([_ROWS], _FAR, gl.float32, of_row), gl.zeros([_ROWS], gl.float32, of_row)
    return first, until, (m, total, gl.zeros([_ROWS, D], gl.float32, layout))


@gluon.jit
def _consume(number: gl.constexpr, work, HEADS: gl.constexpr, QUANTIZE: gl.constexpr, STEADY: gl.constexpr):
    """Tile `number` of every item of this program."""
    bounds, out, out_factor, scale, ring, tiles, results, barriers, sizes = work
    _, _, asked, answered = barriers
    count, _, num_tokens = sizes
    size: gl.constexpr = ring[0].type.shape[2]
    scored: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, size, 16])
    fill = gl.to_tensor(0)
    factor = gl.load(out_factor) if QUANTIZE else 1.0
    gdc_wait()
    top, column = _find_tiles(0, sizes, HEADS, size)
    _, _, coming_from, coming_to = _read_range(bounds, top, num_tokens, _ALL_ROWS)
    coming = _read_range(bounds, top + number * _ROWS, num_tokens, _ROWS)
    for turn in range(count):
        own, everyone = coming, (coming_from, coming_to)
        top, column = _find_tiles(turn + 1, sizes, HEADS, size)  # read ahead
        _, _, coming_from, coming_to = _read_range(bounds, top, num_tokens, _ALL_ROWS)
        coming = _read_range(bounds, top + number * _ROWS, num_tokens, _ROWS)
        top, column = _find_tiles(turn, sizes, HEADS, size)
        first, until, state = _begin_tile(bounds, top + number * _ROWS, num_tokens, scored, layout, size)
        mbarrier.wait(asked.index(turn & 1), turn >> 1 & 1)
        q = tiles.index((turn & 1) * _GROUPS + number)
        if STEADY:
            fill, left, state = _attend_steadily(
                q, ring, barriers, fill, state, first, until, own, top, bounds, num_tokens, scale, scored, layout
            )
        else:
            fill, left, state = _attend(
                q, ring, barriers, fill, state, first, until, own, everyone, bounds, scale, scored, layout
            )
        mbarrier.arrive(answered.index(turn & 1), count=1)
        fill = _pass_over(barriers, fill, left)
        _send(state, factor, out, results.index(number), top + number * _ROWS, column, layout, QUANTIZE)
    tma.store_wait(0)


@gluon.jit
def _make_barriers():
    """Filled and free stages of the ring, queries that came, queries that were used."""
    ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    asked = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    answered = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=_GROUPS)
    for place in gl.static_range(2):
        mbarrier.init(asked.index(place), count=1)
        mbarrier.init(answered.index(place), count=_GROUPS)
    return ready, empty, asked, answered


@gluon.jit(do_not_specialize=["num_tokens", "items", "last"])  # which differ by run: compiled once for all
def _attention_kernel(
    queries, keys, out, starts, ends, out_factor, scale, num_tokens, items, last, HEADS: gl.constexpr,
    QUANTIZE: gl.constexpr, STEADY: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    k_ring = gl.allocate_shared_memory(keys.dtype, [_STAGES] + keys.block_type.shape, keys.layout)  # noqa: RUF005
    v_ring = gl.allocate_shared_memory(keys.dtype, [_STAGES] + keys.block_type.shape, keys.layout)  # noqa: RUF005
    tiles = gl.allocate_shared_memory(queries.dtype, [2 * _GROUPS] + queries.block_type.shape, queries.layout)  # noqa: RUF005
    results = gl.allocate_shared_memory(out.dtype, [_GROUPS] + out.block_type.shape, out.layout)  # noqa: RUF005
    barriers = _make_barriers()
    count = (items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    bounds, ring, sizes = (starts, ends), (k_ring, v_ring), (count, last, num_tokens)
    work = (bounds, out, out_factor, scale, ring, tiles, results, barriers, sizes)
    gl.warp_specialize(
        [
            (_consume, (0, work, HEADS, QUANTIZE, STEADY)),
            (_consume, (1, work, HEADS, QUANTIZE, STEADY)),
            (_consume, (2, work, HEADS, QUANTIZE, STEADY)),
            (_consume, (3, work, HEADS, QUANTIZE, STEADY)),
            (_produce, (queries, keys, bounds, ring, tiles, barriers, sizes, HEADS, STEADY)),
        ],
        [4, 4, 4, 1],
        [_SHARE, _SHARE, _SHARE, 24],
    )


_TYPES = {torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


def _describe(tensor: Tensor) -> Any:
    block = [_ROWS.value, HEAD_SIZE]
    return TensorDescriptor.from_tensor(
        tensor, block, gl.NVMMASharedLayout.get_default_for(block, _TYPES[tensor.dtype])
    )


def attention(
    qkv: Tensor, starts: Tensor, ends: Tensor, heads: int, out: Tensor, num_programs: int,
    out_factor: Tensor | None = None, is_steady: bool = False, is_upward: bool = True, is_early: bool = False,
) -> Any:  # fmt: skip
    """See `attention.attention`; `num_programs`: multiprocessors; `is_early`: see `handover`."""
    num_tokens = len(out)
    down = triton.cdiv(num_tokens, _ALL_ROWS.value)
    tiles = _describe(qkv)
    return _attention_kernel[(min(num_programs, heads * down),)](
        tiles, tiles, _describe(out), starts, ends, starts if out_factor is None else out_factor,
        math.log2(math.e) / math.sqrt(HEAD_SIZE), num_tokens, heads * down, down - 1 if is_upward else -1, HEADS=heads,
        QUANTIZE=out_factor is not None, STEADY=is_steady, num_warps=4, maxnreg=_REGISTERS, launch_pdl=is_early,
    )  # fmt: skip
