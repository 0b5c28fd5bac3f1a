"""A whole encoder for few tokens in one launch: programs that stay, and meet between the steps of a layer.

With few tokens every kernel is shorter than it takes to start one. Here each program computes a few columns of a step
and waits until all have; while it waits, the weights of its next step are on the way. A layer has five steps: queries,
keys and values; attention; output; up; down. Layer norms are computed by everybody who reads them. The interpreter,
where programs cannot wait for each other, launches each step by itself.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.few_tokens_steps import (
    arrive,
    attend,
    keep,
    normalize,
    pool,
    project,
    project_parts,
    read_embeddings,
    read_parts,
    read_row_chunks,
    read_weight,
    wait,
)

MAX_TOKENS = 32  # with more the kernels one by one are as fast
_MAX_HIDDEN = 512  # a program holds whole rows, in pieces of 128
_STEPS = 5  # of a layer; the pooling behind the last is step 5, and step -1 all of them in one launch
_COLUMNS = 32  # that a program computes at a time
_WARPS = 8


@dataclass(frozen=True, slots=True)
class Stacked:
    """Float16 tables [V, H] and [P, H], norms [2L + 1, 2, H], weights [L, N, K] and biases [L, N] of all layers."""

    words: Tensor
    positions: Tensor
    norms: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


class FewTokens:
    """The kernel with the memory it works in. One run at a time."""

    def __init__(self, weights: Stacked, heads: int, eps: float, pooling: str, normalize: bool) -> None:
        """See `fits` for what it can take."""
        self._weights, self._heads, self._eps = weights, heads, eps
        self._pooling, self.normalize = pooling, normalize
        self._layers, self._inner, self._hidden = weights.up_weight.shape
        device = weights.words.device
        # state, queries with keys and values, context, sums, intermediate, and intermediate / hidden parts of the state
        widths = (self._hidden, 3 * self._hidden, self._hidden, self._hidden, self._inner, self._inner)
        self._buffers = [torch.zeros(MAX_TOKENS * width, dtype=torch.float16, device=device) for width in widths]
        self._counter = torch.zeros(1, dtype=torch.int32, device=device)
        self._can_meet = device.type == "cuda"
        units = torch.cuda.get_device_properties(device).multi_processor_count if self._can_meet else 4
        self._programs = 2 ** (min(units, 64).bit_length() - 1)

    @staticmethod
    def fits(hidden: int, heads: int, intermediate: int) -> bool:
        """Whether the kernel can take a model of these sizes."""
        whole = hidden % 128 == 0 and intermediate % hidden == 0
        return whole and hidden <= _MAX_HIDDEN and hidden // heads in (32, 64)

    def run(self, ids: Tensor, starts: Tensor, ends: Tensor, offsets: Tensor, out: Tensor) -> None:
        """Vectors, float32 [B, H], of a packed batch of up to MAX_TOKENS tokens into `out`."""
        if self._can_meet:
            self._launch(-1, 0, self._layers, ids, starts, ends, offsets, out)
            return
        for layer in range(self._layers):
            for step in range(_STEPS):
                self._launch(step, layer, layer + 1, ids, starts, ends, offsets, out)
        self._launch(_STEPS, 0, 0, ids, starts, ends, offsets, out)

    def _launch(self, step: int, first_layer: int, last_layer: int, *batch: Tensor) -> None:
        ids, out, weights = batch[0], batch[-1], self._weights
        _encode_kernel[(self._programs,)](
            *batch[:-1], *(getattr(weights, name) for name in Stacked.__slots__), *self._buffers, out, self._counter,
            len(ids), len(out), first_layer, last_layer, self._layers, self._eps,
            math.log2(math.e) / math.sqrt(self._hidden // self._heads),
            STEP=step, HIDDEN=self._hidden, HEADS=self._heads, INNER=self._inner, POOLING=self._pooling,
            NORMALIZE=self.normalize, FAST=self._can_meet, ROWS=max(16, triton.next_power_of_2(len(ids))),
            COLUMNS=_COLUMNS, PROGRAMS=self._programs, num_warps=_WARPS, num_stages=1,
            launch_cooperative_grid=self._can_meet,
        )  # fmt: skip


@triton.jit
def _encode_kernel(
    ids, starts, ends, offsets, words, positions, norms, qkv_weight, qkv_bias, out_weight, out_bias, up_weight,
    up_bias, down_weight, down_bias, state, qkv, context, sums, inner, parts, out, counter,
    num_tokens, num_rows, first_layer, last_layer, num_layers, eps, scale,
    STEP: tl.constexpr, HIDDEN: tl.constexpr, HEADS: tl.constexpr, INNER: tl.constexpr, POOLING: tl.constexpr,
    NORMALIZE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    batch, tables, buffers = (ids, starts, ends, num_tokens), (words, positions), (state, qkv, context, sums, inner)
    # All arrive at a meeting before anybody passes it, so what lies below a multiple of PROGRAMS is this run's first.
    target = tl.load(counter, cache_modifier=".cg") & -PROGRAMS
    for layer in range(first_layer, last_layer):
        if STEP < 0 or STEP < 3:
            target = _run_attention(
                layer, target, counter, batch, tables, norms, (qkv_weight, qkv_bias, out_weight, out_bias), buffers,
                parts, eps, scale, STEP, HEADS, INNER, ROWS, HIDDEN, COLUMNS, PROGRAMS,
            )  # fmt: skip
        if STEP < 0 or (STEP >= 3 and STEP < 5):
            target = _run_feed_forward(
                layer, target, counter, num_tokens, norms, (up_weight, up_bias, down_weight, down_bias), buffers,
                parts, eps, STEP, INNER, FAST, ROWS, HIDDEN, COLUMNS, PROGRAMS,
            )  # fmt: skip
    if STEP < 0 or STEP == 5:
        wait(counter, target, STEP)
        for row in range(tl.program_id(0), num_rows, PROGRAMS):
            x = read_parts(parts, num_tokens, ROWS, HIDDEN, INNER // HIDDEN)
            x = normalize(x, norms + 4 * num_layers * HIDDEN, eps, words.dtype.element_ty, HIDDEN)
            pool(x, offsets, out, row, ROWS, HIDDEN, POOLING, NORMALIZE)


@triton.jit
def _run_attention(
    layer, target, counter, batch, tables, norms, weights, buffers, parts, eps, scale,
    STEP: tl.constexpr, HEADS: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The first three steps of a layer."""
    state, qkv, context, sums, _ = buffers
    qkv_weight, qkv_bias, out_weight, out_bias = weights
    num_tokens, program = batch[3], tl.program_id(0)
    across: tl.constexpr = HIDDEN // COLUMNS
    if STEP < 0 or STEP == 0:
        weight, bias = qkv_weight + layer * 3 * HIDDEN * HIDDEN, qkv_bias + layer * 3 * HIDDEN
        w = read_weight(weight, program, 3 * across, HIDDEN, 3 * across, COLUMNS, HIDDEN)
        wait(counter, target, STEP)
        if program < 3 * across:
            if layer == 0:
                x = read_embeddings(batch, tables, ROWS, HIDDEN)
            else:
                x = read_parts(parts, num_tokens, ROWS, HIDDEN, INNER // HIDDEN)
            x = normalize(x, norms + 4 * layer * HIDDEN, eps, state.dtype.element_ty, HIDDEN)
            keep(x, state, num_tokens, ROWS, HIDDEN)
            project(
                x, w, weight, bias, qkv, None, num_tokens, 3 * HIDDEN, False, False, ROWS, HIDDEN, COLUMNS, PROGRAMS
            )
        target = arrive(counter, target, STEP, PROGRAMS)
    if STEP < 0 or STEP == 1:
        wait(counter, target, STEP)
        for head in range(program, HEADS, PROGRAMS):
            attend(qkv, batch, context, head, HIDDEN, scale, ROWS, HIDDEN // HEADS)
        target = arrive(counter, target, STEP, PROGRAMS)
    if STEP < 0 or STEP == 2:
        weight, bias = out_weight + layer * HIDDEN * HIDDEN, out_bias + layer * HIDDEN
        w = read_weight(weight, program, across, HIDDEN, across, COLUMNS, HIDDEN)
        wait(counter, target, STEP)
        if program < across:
            x = read_row_chunks(context, HIDDEN, num_tokens, ROWS, HIDDEN)
            project(x, w, weight, bias, sums, state, num_tokens, HIDDEN, False, False, ROWS, HIDDEN, COLUMNS, PROGRAMS)
        target = arrive(counter, target, STEP, PROGRAMS)
    return target


@triton.jit
def _run_feed_forward(
    layer, target, counter, num_tokens, norms, weights, buffers, parts, eps,
    STEP: tl.constexpr, INNER: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The last two steps of a layer."""
    state, _, _, sums, inner = buffers
    up_weight, up_bias, down_weight, down_bias = weights
    program = tl.program_id(0)
    across: tl.constexpr = HIDDEN // COLUMNS
    if STEP < 0 or STEP == 3:
        weight, bias = up_weight + layer * INNER * HIDDEN, up_bias + layer * INNER
        w = read_weight(weight, program, INNER // COLUMNS, HIDDEN, INNER // COLUMNS, COLUMNS, HIDDEN)
        wait(counter, target, STEP)
        if program < INNER // COLUMNS:
            x = read_parts(sums, num_tokens, ROWS, HIDDEN, 1)
            x = normalize(x, norms + (4 * layer + 2) * HIDDEN, eps, state.dtype.element_ty, HIDDEN)
            keep(x, state, num_tokens, ROWS, HIDDEN)
            project(x, w, weight, bias, inner, None, num_tokens, INNER, True, FAST, ROWS, HIDDEN, COLUMNS, PROGRAMS)
        target = arrive(counter, target, STEP, PROGRAMS)
    if STEP < 0 or STEP == 4:
        weight, bias = down_weight + layer * INNER * HIDDEN, down_bias + layer * HIDDEN
        w = read_weight(weight, program, across * (INNER // HIDDEN), INNER, across, COLUMNS, HIDDEN)
        wait(counter, target, STEP)
        project_parts(inner, w, weight, bias, parts, state, num_tokens, INNER, ROWS, HIDDEN, COLUMNS, PROGRAMS)
        target = arrive(counter, target, STEP, PROGRAMS)
    return target
