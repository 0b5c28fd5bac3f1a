"""Ping-pong GEMM for Hopper (capability 9.x): bias, GELU, residual and E4M3 output in an epilogue that costs no time.

One warp feeds a ring of tiles through the copy engine; two warpgroups take turns at the tensor cores, so that one's
epilogue runs while the other multiplies. Barriers: `ready` and `empty` of each ring stage, `turns` hand the tensor
cores over. A turn also keeps a warpgroup from waiting two fills ahead, where a barrier's parity says nothing.
"""

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
def _consume(
    number: gl.constexpr, residual, out, epilogue, ring, tiles, barriers, sizes, BIAS: gl.constexpr,
    GELU: gl.constexpr, RESIDUAL: gl.constexpr, SCALES: gl.constexpr, QUANTIZE: gl.constexpr,
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
        tile = gl.program_id(0) + turn * gl.num_programs(0)
        top, left = tile // across * rows, tile % across * columns
        tma.store_wait(0)
        _meet()
        if RESIDUAL:
            mbarrier.expect(landed, residual.block_type.nbytes)
            tma.async_copy_global_to_shared(residual, [top, left], landed, buffer)
        mbarrier.wait(mine, (turn // 2 & 1) ^ (1 - number))
        acc = _multiply(ring, ready, empty, turn * depth, depth, layout)
        mbarrier.arrive(turns.index(1 - number), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((turn * depth + depth - 1) % stages), count=1)
        acc = _finish(acc, epilogue, top, left, layout, BIAS, GELU, SCALES)
        if RESIDUAL:
            mbarrier.wait(landed, turn // 2 & 1)
            acc += buffer.load(layout).to(gl.float32)
        if QUANTIZE:
            acc = gl.minimum(gl.maximum(acc * gl.load(epilogue[3]), -448.0), 448.0)
        buffer.store(acc.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [top, left], buffer)
    tma.store_wait(0)


@gluon.jit
def _finish(
    acc, epilogue, top, left, layout: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, SCALES: gl.constexpr
):
    """Scales of the operands, bias and activation."""
    bias, x_scales, weight_scale, _, num_rows = epilogue
    if SCALES != "none":
        scale = gl.load(weight_scale)
        if SCALES == "rows":
            rows = top + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
            acc = acc * (gl.load(x_scales + rows, rows < num_rows, other=0.0) * scale)[:, None]
        else:
            acc = acc * (gl.load(x_scales) * scale)
    if BIAS:
        columns = left + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
        acc = acc + gl.load(bias + columns).to(gl.float32)[None, :]
    if GELU:
        acc = _gelu(acc)
    return acc


@gluon.jit
def _linear_kernel(
    x, weight, residual, out, bias, x_scales, weight_scale, out_factor, num_rows, tiles, depth, across,
    STAGES: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr, SCALES: gl.constexpr,
    QUANTIZE: gl.constexpr,
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
    ends = (bias, x_scales, weight_scale, out_factor, num_rows)
    barriers = (ready, empty, turns, arrived)
    gl.warp_specialize(
        [
            (
                _consume,
                (0, residual, out, ends, ring, buffers, barriers, sizes, BIAS, GELU, RESIDUAL, SCALES, QUANTIZE),
            ),
            (
                _consume,
                (1, residual, out, ends, ring, buffers, barriers, sizes, BIAS, GELU, RESIDUAL, SCALES, QUANTIZE),
            ),
            (_produce, (x, weight, ring, ready, empty, sizes)),
        ],
        [4, 1],
        [240, 24],
    )


_TYPES = {torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


def _describe(tensor: Tensor, block: list[int]) -> Any:
    return TensorDescriptor.from_tensor(
        tensor, block, gl.NVMMASharedLayout.get_default_for(block, _TYPES[tensor.dtype])
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_programs: int, gelu: bool = False,
    residual: Tensor | None = None, x_scales: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None,
) -> Any:  # fmt: skip
    """See `gemm.linear`; `num_programs`: multiprocessors; `residual` [T, N] is added and may be `out`."""
    (num_rows, width), columns = x.shape, weight.shape[0]
    step = _STEP_BYTES // x.element_size()
    across = columns // _BLOCK
    tiles = triton.cdiv(num_rows, _BLOCK) * across
    result = _describe(out, [_BLOCK, _BLOCK])
    scales = "none" if x_scales is None else "tensor" if x_scales.numel() == 1 else "rows"
    operands = [weight if each is None else each for each in (bias, x_scales, weight_scale, out_factor)]
    return _linear_kernel[(min(num_programs, tiles),)](
        _describe(x, [_BLOCK, step]), _describe(weight, [_BLOCK, step]),
        result if residual is None else _describe(residual, [_BLOCK, _BLOCK]), result,
        *operands, num_rows, tiles, width // step, across, STAGES=_STAGES, BIAS=bias is not None, GELU=gelu,
        RESIDUAL=residual is not None, SCALES=scales, QUANTIZE=out_factor is not None, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
