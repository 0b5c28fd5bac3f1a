"""Ping-pong GEMM for Hopper (capability 9.x): bias, GELU, residual, norms and E4M3 output in an epilogue without cost.

One warp feeds a ring of tiles through the copy engine; two warpgroups take turns at the tensor cores, so that one's
epilogue runs while the other multiplies. Barriers: `ready` and `empty` of each ring stage, `turns` hand the tensor
cores over. A turn also keeps a warpgroup from waiting two fills ahead, where a barrier's parity says nothing.
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

_BLOCK = 128  # rows and columns of a tile
_STEP_BYTES = 128  # of a tile's row in the ring: one swizzle span
_STAGES = 5
_REGISTERS = 168  # a thread of twelve warps may have; the feeding warp gives its share to those who multiply
_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # triton 3.7 renamed it

_A, _B, _C = gl.constexpr(0.79745847), gl.constexpr(0.037050345), gl.constexpr(-0.00035873236)


@gluon.jit
def _gelu(x):
    """The fast form of `gemm.gelu`."""
    square = gl.minimum(x * x, 49.0)
    inner = x * (_A + square * (_B + square * _C))
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=gl.float32, is_pure=True, pack=1)
    half = 0.5 * x
    return half + half * tanh


@gluon.jit
def _produce(x, weight, ring, ready, empty, sizes):
    """Fill the ring, tile after tile of this program."""
    count, depth, across = sizes
    x_ring, weight_ring = ring
    stages: gl.constexpr = x_ring.type.shape[0]
    step: gl.constexpr = x.block_type.shape[1]
    slot, phase = 0, 1
    for turn in range(count):
        tile = gl.program_id(0) + turn * gl.num_programs(0)
        top, left = tile // across * x.block_type.shape[0], tile % across * weight.block_type.shape[0]
        for k in range(depth):
            bar = ready.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, x.block_type.nbytes + weight.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [top, k * step], bar, x_ring.index(slot))
            tma.async_copy_global_to_shared(weight, [left, k * step], bar, weight_ring.index(slot))
            slot += 1
            if slot == stages:
                slot, phase = 0, phase ^ 1


@gluon.jit
def _multiply(ring, ready, empty, first, depth, layout: gl.constexpr):
    """The product of one tile from `depth` ring stages, the tile's first being fill number `first`."""
    x_ring, weight_ring = ring
    stages: gl.constexpr = x_ring.type.shape[0]
    rows: gl.constexpr = x_ring.type.shape[1]
    columns: gl.constexpr = weight_ring.type.shape[1]
    acc = gl.zeros([rows, columns], gl.float32, layout)
    for k in range(depth):
        slot = (first + k) % stages
        mbarrier.wait(ready.index(slot), (first + k) // stages & 1)
        weight = weight_ring.index(slot).permute((1, 0))
        acc = warpgroup_mma(x_ring.index(slot), weight, acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((first + k + stages - 1) % stages), count=1, pred=k > 0)
    return acc


@gluon.jit
def _find_tile(turn, across, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """First row and column of this program's tile number `turn`."""
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    return tile // across * ROWS, tile % across * COLUMNS


@gluon.jit
def _consume(
    number: gl.constexpr, residual, out, epilogue, norms, ring, tiles, barriers, sizes, BIAS: gl.constexpr,
    GELU: gl.constexpr, RESIDUAL: gl.constexpr, SCALES: gl.constexpr, QUANTIZE: gl.constexpr, NORM: gl.constexpr,
    SUM: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """Every second tile of this program: multiply in turn, then finish the tile while the other multiplies."""
    ready, empty, turns, arrived = barriers
    count, depth, across = sizes
    stages: gl.constexpr = ring[0].type.shape[0]
    rows: gl.constexpr = out.block_type.shape[0]
    columns: gl.constexpr = out.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 256 // ring[0].dtype.primitive_bitwidth]
    )
    buffer, mine, landed = tiles.index(number), turns.index(number), arrived.index(number)
    for turn in range(number, count, 2):
        top, left = _find_tile(turn, across, rows, columns)
        tma.store_wait(0)
        _meet()
        if RESIDUAL:
            mbarrier.expect(landed, residual.block_type.nbytes)
            tma.async_copy_global_to_shared(residual, [top, left], landed, buffer)
        early = _read_early(epilogue, norms, top, left, layout, rows, columns, BIAS, NORM, HIDDEN)
        mbarrier.wait(mine, (turn // 2 & 1) ^ (1 - number))
        acc = _multiply(ring, ready, empty, turn * depth, depth, layout)
        mbarrier.arrive(turns.index(1 - number), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((turn * depth + depth - 1) % stages), count=1)
        acc = _finish(acc, early, epilogue, top, layout, BIAS, GELU, SCALES, NORM)
        if RESIDUAL:
            mbarrier.wait(landed, turn // 2 & 1)
            acc += _normalize(buffer.load(layout).to(gl.float32), early, NORM)
        if SUM:
            _store_sums(acc, norms[3], epilogue[4], top, left, layout, HIDDEN)
        if QUANTIZE:
            acc = gl.minimum(gl.maximum(acc * gl.load(epilogue[3]), -448.0), 448.0)
        buffer.store(acc.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [top, left], buffer)
    tma.store_wait(0)


@gluon.jit
def _read_early(
    epilogue, norms, top, left, layout: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BIAS: gl.constexpr,
    NORM: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """What the epilogue needs, read before the turn so that it waits for nothing: bias, and of the norm its factors and
    the rows' mean and reciprocal spread, from the sums over each 128 of their columns."""
    sums, factors, eps, _ = norms
    columns = left + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    rows = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    bias = gl.zeros([COLUMNS], gl.float16, gl.SliceLayout(0, layout))
    factor = gl.zeros([COLUMNS], gl.float32, gl.SliceLayout(0, layout))
    mean = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    square = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    if BIAS:
        bias = gl.load(epilogue[0] + columns)
    if NORM != "none":
        factor = gl.load(factors + columns)
        for part in gl.static_range(HIDDEN // 128):
            place = sums + (rows * (HIDDEN // 128) + part) * 2
            mean += gl.load(place, rows < epilogue[4], other=0.0) / HIDDEN
            square += gl.load(place + 1, rows < epilogue[4], other=0.0) / HIDDEN
        square = gl.rsqrt(square - mean * mean + eps)
    return bias, factor, mean, square


@gluon.jit
def _finish(
    acc, early, epilogue, top, layout: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, SCALES: gl.constexpr,
    NORM: gl.constexpr,
):  # fmt: skip
    """Layer norm or scales of the operands, bias and activation."""
    bias, factor, mean, spread = early
    _, x_scales, weight_scale, _, num_rows = epilogue
    if NORM == "x":
        acc = (acc - mean[:, None] * factor[None, :]) * spread[:, None]
    if SCALES == "rows":
        rows = top + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
        acc = acc * (gl.load(x_scales + rows, rows < num_rows, other=0.0) * gl.load(weight_scale))[:, None]
    elif SCALES == "tensor":
        acc = acc * (gl.load(x_scales) * gl.load(weight_scale))
    if BIAS:
        acc = acc + bias.to(gl.float32)[None, :]
    if GELU:
        acc = _gelu(acc)
    return acc


@gluon.jit
def _normalize(residual, early, NORM: gl.constexpr):
    """The residual behind its norm, whose shift is in the bias."""
    _, factor, mean, spread = early
    if NORM == "residual":
        residual = (residual - mean[:, None]) * spread[:, None] * factor[None, :]
    return residual


@gluon.jit
def _store_sums(x, sums, num_rows, top, left, layout: gl.constexpr, HIDDEN: gl.constexpr):
    """Sum and sum of squares of each row over this tile's columns, for the layer norm of who reads them."""
    rows = top + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))
    place = sums + (rows * (HIDDEN // 128) + left // 128) * 2
    gl.store(place, gl.sum(x, axis=1), rows < num_rows)
    gl.store(place + 1, gl.sum(x * x, axis=1), rows < num_rows)


@gluon.jit
def _linear_kernel(
    x, weight, residual, out, bias, x_scales, weight_scale, out_factor, sums, factors, out_sums, eps,
    num_rows, tiles, depth, across, STAGES: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
    RESIDUAL: gl.constexpr, SCALES: gl.constexpr, QUANTIZE: gl.constexpr, NORM: gl.constexpr, SUM: gl.constexpr,
    HIDDEN: gl.constexpr,
):  # fmt: skip
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)  # noqa: RUF005
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)  # noqa: RUF005
    buffers = gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for number in gl.static_range(2):
        mbarrier.init(turns.index(number), count=1)
        mbarrier.init(arrived.index(number), count=1)
    count = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    ring, sizes = (x_ring, weight_ring), (count, depth, across)
    ends, norms = (bias, x_scales, weight_scale, out_factor, num_rows), (sums, factors, eps, out_sums)
    barriers = (ready, empty, turns, arrived)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (0, residual, out, ends, norms, ring, buffers, barriers, sizes,
                        BIAS, GELU, RESIDUAL, SCALES, QUANTIZE, NORM, SUM, HIDDEN)),
            (_consume, (1, residual, out, ends, norms, ring, buffers, barriers, sizes,
                        BIAS, GELU, RESIDUAL, SCALES, QUANTIZE, NORM, SUM, HIDDEN)),
            (_produce, (x, weight, ring, ready, empty, sizes)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


_TYPES = {torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@dataclass(frozen=True, slots=True)
class RowNorm:
    """A layer norm that was not applied yet: float32 `sums` [T, H / 128, 2], sum and sum of squares of each row.

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


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_programs: int, gelu: bool = False,
    residual: Tensor | None = None, x_scales: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None, norm: RowNorm | None = None, out_sums: Tensor | None = None,
) -> Any:  # fmt: skip
    """See `gemm.linear`; `num_programs`: multiprocessors; `residual` [T, N] is added and may be `out`.

    `norm` is of the residual where there is one, else of x. `out_sums` takes the sums that a norm of `out` needs.
    """
    (num_rows, width), columns = x.shape, weight.shape[0]
    step = _STEP_BYTES // x.element_size()
    across = columns // _BLOCK
    tiles = triton.cdiv(num_rows, _BLOCK) * across
    result = _describe(out, [_BLOCK, _BLOCK])
    scales = "none" if x_scales is None else "tensor" if x_scales.numel() == 1 else "rows"
    sums, factors = (None, None) if norm is None else (norm.sums, norm.factors)
    operands = [
        weight if each is None else each for each in (bias, x_scales, weight_scale, out_factor, sums, factors, out_sums)
    ]
    return _linear_kernel[(min(num_programs, tiles),)](
        _describe(x, [_BLOCK, step]), _describe(weight, [_BLOCK, step]),
        result if residual is None else _describe(residual, [_BLOCK, _BLOCK]), result,
        *operands, 0.0 if norm is None else norm.eps, num_rows, tiles, width // step, across, STAGES=_STAGES,
        BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None, SCALES=scales,
        QUANTIZE=out_factor is not None, NORM="none" if norm is None else "x" if residual is None else "residual",
        SUM=out_sums is not None, HIDDEN=columns if residual is not None else width, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
