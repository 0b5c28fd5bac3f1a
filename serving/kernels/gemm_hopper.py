"""Ping-pong GEMM for Hopper (capability 9.x): bias, GELU, residual, norms and E4M3 output in an epilogue without cost.

One warp feeds a ring of tiles through the copy engine; warpgroups take turns at the tensor cores, so that the epilogues
of some run while another multiplies. Barriers: `ready` and `empty` of each ring stage, `turns` hand the tensor cores
over. A turn also keeps a warpgroup from waiting two fills ahead, where a barrier's parity says nothing.

Where a column of tiles has its weights in half of the shared memory they stay there, and only activations pass through
the ring: three warpgroups then have tiles of 64 rows, and an epilogue has twice the time that a product takes. Else two
warpgroups have tiles of 128 rows.
"""

from dataclasses import dataclass
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

from serving.kernels.gemm_hopper_epilogue import finish, normalize, read_columns, read_rows, store_sums
from serving.kernels.handover import starts_early

_COLUMNS = 128  # of a tile
_STEP_BYTES = 128  # of a tile's row in the ring: one swizzle span
_SHARED_BYTES = 230_000  # for rings and results; the rest is barriers
_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # triton 3.7 renamed it


@dataclass(frozen=True, slots=True)
class _Form:
    """Rows of a tile, warpgroups that multiply, stages of the ring at most, and registers a thread at the launch: the
    feeding warp gives its share to those who multiply."""

    rows: int
    groups: int
    stages: int
    registers: int


_STREAMING, _RESIDENT = _Form(128, 2, 5, 168), _Form(64, 3, 8, 128)
_RESIDENT_BYTES = 98_304  # of a column of tiles' weights: half of the shared memory leaves room for everything else


@gluon.jit
def _find_tile(turn, sizes, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Top row and left column of this program's tile; tiles go across the columns first, for the second cache, and down
    the rows, or up from the `last` where there is one."""
    _, _, across, last = sizes
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    row = tile // across
    return gl.where(last < 0, row, last - row) * ROWS, tile % across * COLUMNS


@gluon.jit
def _produce(x, weight, ring, barriers, sizes, RESIDENT: gl.constexpr):
    """Fill the ring, tile after tile of this program; resident weights once."""
    ready, empty, _, _, loaded = barriers
    count, depth, _, _ = sizes
    x_ring, weights = ring
    stages: gl.constexpr = x_ring.type.shape[0]
    rows: gl.constexpr = x.block_type.shape[0]
    columns: gl.constexpr = weight.block_type.shape[0]
    step: gl.constexpr = x.block_type.shape[1]
    kept: gl.constexpr = weights.type.shape[0]
    if RESIDENT:
        _, left = _find_tile(0, sizes, rows, columns)
        mbarrier.expect(loaded, weight.block_type.nbytes * kept)
        for part in gl.static_range(kept):
            tma.async_copy_global_to_shared(weight, [left, part * step], loaded, weights.index(part))
    gdc_wait()  # the weights are there from the start, the activations with the kernel before
    slot, phase = 0, 1
    for turn in range(count):
        top, left = _find_tile(turn, sizes, rows, columns)
        for k in range(depth):
            bar = ready.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            if RESIDENT:
                mbarrier.expect(bar, x.block_type.nbytes)
            else:
                mbarrier.expect(bar, x.block_type.nbytes + weight.block_type.nbytes)
                tma.async_copy_global_to_shared(weight, [left, k * step], bar, weights.index(slot))
            tma.async_copy_global_to_shared(x, [top, k * step], bar, x_ring.index(slot))
            slot += 1
            if slot == stages:
                slot, phase = 0, phase ^ 1


@gluon.jit
def _multiply(ring, ready, empty, first, depth, layout: gl.constexpr, RESIDENT: gl.constexpr):
    """The product of one tile from `depth` ring stages, the tile's first being fill number `first`."""
    x_ring, weights = ring
    stages: gl.constexpr = x_ring.type.shape[0]
    rows: gl.constexpr = x_ring.type.shape[1]
    columns: gl.constexpr = weights.type.shape[1]
    acc = gl.zeros([rows, columns], gl.float32, layout)
    for k in range(depth):
        slot = (first + k) % stages
        mbarrier.wait(ready.index(slot), (first + k) // stages & 1)
        weight = weights.index(k if RESIDENT else slot).permute((1, 0))
        acc = warpgroup_mma(x_ring.index(slot), weight, acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((first + k + stages - 1) % stages), count=1, pred=k > 0)
    return acc


@gluon.jit
def _multiply_in_turn(
    number: gl.constexpr, turn, ring, barriers, depth, layout: gl.constexpr, GROUPS: gl.constexpr,
    RESIDENT: gl.constexpr,
):  # fmt: skip
    """The product of a tile, with the tensor cores for itself: taken over from the group before, handed to the next."""
    ready, empty, turns, _, _ = barriers
    stages: gl.constexpr = ring[0].type.shape[0]
    mbarrier.wait(turns.index(number), (turn // GROUPS & 1) ^ (1 if number == 0 else 0))
    acc = _multiply(ring, ready, empty, turn * depth, depth, layout, RESIDENT)
    mbarrier.arrive(turns.index((number + 1) % GROUPS), count=1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((turn * depth + depth - 1) % stages), count=1)
    return acc


@gluon.jit
def _send(acc, out, copy, buffers, top, left, out_factor, QUANTIZE: gl.constexpr):
    """Write a tile, times the factor where it is E4M3, and once more so where there is a copy. The conversion cuts what
    is beyond E4M3."""
    buffer, copy_buffer = buffers
    if QUANTIZE == "out":
        acc = acc * out_factor
    buffer.store(acc.to(out.dtype))
    if QUANTIZE == "copy":
        copy_buffer.store((acc * out_factor).to(copy.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [top, left], buffer)
    if QUANTIZE == "copy":
        tma.async_copy_shared_to_global(copy, [top, left], copy_buffer)


@gluon.jit
def _consume(
    number: gl.constexpr, work, GROUPS: gl.constexpr, RESIDENT: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
    RESIDUAL: gl.constexpr, SCALES: gl.constexpr, QUANTIZE: gl.constexpr, NORM: gl.constexpr, SUM: gl.constexpr,
    HIDDEN: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Every GROUPS-th tile of this program: multiply in turn, then finish the tile while the others multiply."""
    residual, out, copy, epilogue, norms, ring, tiles, copies, barriers, sizes = work
    _, _, _, arrived, loaded = barriers
    count, depth, _, _ = sizes
    rows: gl.constexpr = out.block_type.shape[0]
    columns: gl.constexpr = out.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 256 // ring[0].dtype.primitive_bitwidth]
    )
    out_factor = gl.load(epilogue[3]) if QUANTIZE != "none" else 1.0
    buffer, landed = tiles.index(number), arrived.index(number)
    _, left = _find_tile(0, sizes, rows, columns)
    of_columns = read_columns(epilogue[0], norms[1], left, layout, columns, BIAS, GELU, NORM)
    if RESIDENT:
        mbarrier.wait(loaded, 0)
    gdc_wait()
    for turn in range(number, count, GROUPS):
        top, left = _find_tile(turn, sizes, rows, columns)
        tma.store_wait(0)
        _meet()
        if RESIDUAL:
            mbarrier.expect(landed, residual.block_type.nbytes)
            tma.async_copy_global_to_shared(residual, [top, left], landed, buffer)
        if not RESIDENT:
            of_columns = read_columns(epilogue[0], norms[1], left, layout, columns, BIAS, GELU, NORM)
        of_rows = read_rows(epilogue, norms, top, layout, rows, GELU, SCALES, NORM, HIDDEN, PARTS)
        acc = _multiply_in_turn(number, turn, ring, barriers, depth, layout, GROUPS, RESIDENT)
        acc = finish(acc, of_columns, of_rows, BIAS, GELU, SCALES, NORM)
        if RESIDUAL:
            mbarrier.wait(landed, turn // GROUPS & 1)
            acc += normalize(buffer.load(layout).to(gl.float32), of_columns, of_rows, NORM)
        if SUM:
            store_sums(acc, norms[3], epilogue[4], top, left, layout, HIDDEN)
        _send(acc, out, copy, (buffer, copies.index(number)), top, left, out_factor, QUANTIZE)
    tma.store_wait(0)


@gluon.jit
def _make_barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Filled and free stages of the ring, whose turn it is to multiply, residuals that landed, weights that did."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for number in gl.static_range(GROUPS):
        mbarrier.init(turns.index(number), count=1)
        mbarrier.init(arrived.index(number), count=1)
    mbarrier.init(loaded, count=1)
    return ready, empty, turns, arrived, loaded


@gluon.jit(do_not_specialize=["num_rows", "tiles", "last"])  # which differ by run: compiled once for all
def _linear_kernel(
    x, weight, residual, out, copy, bias, x_scales, weight_scale, out_factor, sums, factors, out_sums, eps,
    num_rows, tiles, across, last, DEPTH: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    RESIDENT: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr, SCALES: gl.constexpr,
    QUANTIZE: gl.constexpr, NORM: gl.constexpr, SUM: gl.constexpr, HIDDEN: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    kept: gl.constexpr = DEPTH if RESIDENT else STAGES
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)  # noqa: RUF005
    weights = gl.allocate_shared_memory(weight.dtype, [kept] + weight.block_type.shape, weight.layout)  # noqa: RUF005
    buffers = gl.allocate_shared_memory(out.dtype, [GROUPS] + out.block_type.shape, out.layout)  # noqa: RUF005
    copies = buffers
    if QUANTIZE == "copy":
        copies = gl.allocate_shared_memory(copy.dtype, [GROUPS] + copy.block_type.shape, copy.layout)  # noqa: RUF005
    barriers = _make_barriers(STAGES, GROUPS)
    count = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    ring, sizes = (x_ring, weights), (count, DEPTH, across, last)
    ends, norms = (bias, x_scales, weight_scale, out_factor, num_rows), (sums, factors, eps, out_sums)
    work = (residual, out, copy, ends, norms, ring, buffers, copies, barriers, sizes)
    # fmt: off
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (0, work, GROUPS, RESIDENT, BIAS, GELU, RESIDUAL, SCALES, QUANTIZE, NORM, SUM, HIDDEN, PARTS)),
            (_consume, (1, work, GROUPS, RESIDENT, BIAS, GELU, RESIDUAL, SCALES, QUANTIZE, NORM, SUM, HIDDEN, PARTS)),
            (_produce, (x, weight, ring, barriers, sizes, RESIDENT)),
        ], [4, 1], [240, 24])
    else:
        gl.warp_specialize([
            (_consume, (0, work, GROUPS, RESIDENT, BIAS, GELU, RESIDUAL, SCALES, QUANTIZE, NORM, SUM, HIDDEN, PARTS)),
            (_consume, (1, work, GROUPS, RESIDENT, BIAS, GELU, RESIDUAL, SCALES, QUANTIZE, NORM, SUM, HIDDEN, PARTS)),
            (_consume, (2, work, GROUPS, RESIDENT, BIAS, GELU, RESIDUAL, SCALES, QUANTIZE, NORM, SUM, HIDDEN, PARTS)),
            (_produce, (x, weight, ring, barriers, sizes, RESIDENT)),
        ], [4, 4, 1], [160, 160, 24])
    # fmt: on


_TYPES = {torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@dataclass(frozen=True, slots=True)
class RowNorm:
    """A layer norm that was not applied yet: float32 `sums` [T, parts, 2], sum and sum of squares of each row.

    Of the first operand: its scale is in the weight, whose rows' sums are `factors` [N], its shift in the bias. Of the
    residual: `factors` [N] are its scale, its shift is in the bias.
    """

    sums: Tensor
    factors: Tensor
    eps: float


def _describe(tensor: Tensor, block: list[int]) -> Any:
    return TensorDescriptor.from_tensor(
        tensor, block, gl.NVMMASharedLayout.get_default_for(block, _TYPES[tensor.dtype])
    )


def _plan(row_bytes: int, across: int, num_programs: int, out_bytes: int, is_narrow: bool) -> tuple[_Form, int, int]:
    """The form for weight rows of so many bytes, its stages and programs; `out_bytes` of a value that is written."""
    left_out = num_programs % across  # a program keeps its column; E4M3 loses more by it than it gains
    if _COLUMNS * row_bytes <= _RESIDENT_BYTES and left_out <= (0 if is_narrow else num_programs // 20):
        room = _SHARED_BYTES - _COLUMNS * row_bytes - _RESIDENT.groups * _RESIDENT.rows * _COLUMNS * out_bytes
        stages = min(_RESIDENT.stages, room // (_RESIDENT.rows * _STEP_BYTES))
        return _RESIDENT, stages, num_programs - left_out
    room = _SHARED_BYTES - _STREAMING.groups * _STREAMING.rows * _COLUMNS * out_bytes
    stages = min(_STREAMING.stages, room // ((_STREAMING.rows + _COLUMNS) * _STEP_BYTES))
    return _STREAMING, stages, num_programs


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_programs: int, gelu: bool = False,
    residual: Tensor | None = None, x_scales: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None, norm: RowNorm | None = None, out_sums: Tensor | None = None,
    copy: Tensor | None = None, is_upward: bool = False,
) -> Any:  # fmt: skip
    """See `gemm.linear`; `num_programs`: multiprocessors; `residual` [T, N] is added and may be `out`.

    `norm` is of the residual where there is one, else of x. `out_sums` takes the sums that a norm of `out` needs.
    `copy` (E4M3 [T, N]) takes the result times `out_factor`, which then leaves `out` alone.
    `is_upward` begins with the last rows: those that whoever wrote x downward left in the second cache.
    """
    (num_rows, width), columns, size = x.shape, weight.shape[0], x.element_size()
    step, across = _STEP_BYTES // size, columns // _COLUMNS
    out_bytes = out.element_size() + (copy is not None)
    form, stages, programs = _plan(width * size, across, num_programs, out_bytes, size == 1)
    down = triton.cdiv(num_rows, form.rows)
    tiles = down * across
    result = _describe(out, [form.rows, _COLUMNS])
    scales = "none" if x_scales is None else "tensor" if x_scales.numel() == 1 else "rows"
    sums, factors = (None, None) if norm is None else (norm.sums, norm.factors)
    operands = [
        weight if each is None else each for each in (bias, x_scales, weight_scale, out_factor, sums, factors, out_sums)
    ]
    return _linear_kernel[(min(programs, tiles),)](
        _describe(x, [form.rows, step]), _describe(weight, [_COLUMNS, step]),
        result if residual is None else _describe(residual, [form.rows, _COLUMNS]), result,
        result if copy is None else _describe(copy, [form.rows, _COLUMNS]),
        *operands, 0.0 if norm is None else norm.eps, num_rows, tiles, across,
        down - 1 if is_upward else -1, DEPTH=width // step, STAGES=stages,
        GROUPS=form.groups, RESIDENT=form is _RESIDENT, BIAS=bias is not None, GELU=gelu,
        RESIDUAL=residual is not None, SCALES=scales,
        QUANTIZE="copy" if copy is not None else "none" if out_factor is None else "out",
        NORM="none" if norm is None else "x" if residual is None else "residual", SUM=out_sums is not None,
        HIDDEN=columns if residual is not None else width,
        PARTS=1 if sums is None else sums.shape[1], num_warps=4, maxnreg=form.registers,
        launch_pdl=starts_early(x),
    )  # fmt: skip
