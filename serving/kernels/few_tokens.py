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

from serving.kernels.gemm import gelu

MAX_TOKENS = 32  # with more the kernels one by one are as fast
_MAX_HIDDEN = 512  # a program holds whole rows, in pieces of 128
_STEPS = 5  # of a layer; the pooling behind the last is step 5, and step -1 all of them in one launch
_COLUMNS = 32  # that a program computes at a time; with 16 its warps outnumber the tile, and it read past its memory
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
        self._pooling, self._normalize = pooling, normalize
        self._layers, self._inner, self._hidden = weights.up_weight.shape
        device = weights.words.device
        widths = (self._hidden, 3 * self._hidden, self._hidden, self._hidden, self._inner)
        widths = (*widths, self._inner)  # the last holds inner / hidden parts of the hidden state
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
            NORMALIZE=self._normalize, FAST=self._can_meet, ROWS=max(16, triton.next_power_of_2(len(ids))),
            COLUMNS=_COLUMNS, PROGRAMS=self._programs, num_warps=_WARPS, num_stages=1,
            launch_cooperative_grid=self._can_meet,
        )  # fmt: skip


@triton.jit
def _arrive(counter, target, STEP: tl.constexpr, PROGRAMS: tl.constexpr):
    """Say that this program's results are written; returns what the counter is when everybody has said so."""
    if STEP < 0:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            """{
            .reg .pred %others;
            .reg .b32 %thread;
            mov.u32 %thread, %tid.x;
            setp.ne.u32 %others, %thread, 0;
            @!%others red.release.gpu.global.add.s32 [$1], 1;
            mov.b32 $0, 0;
            }""",
            "=r,l", [counter.to(tl.int64)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return target + PROGRAMS


@triton.jit
def _wait(counter, target, STEP: tl.constexpr):
    """Return once the counter has reached `target`; it wraps around, so only differences count. One thread looks."""
    if STEP < 0:
        tl.inline_asm_elementwise(
            """{
            .reg .pred %again;
            .reg .b32 %seen;
            mov.u32 %seen, %tid.x;
            setp.ne.u32 %again, %seen, 0;
            @%again bra DONE;
            LOOK:
            ld.acquire.gpu.global.s32 %seen, [$1];
            sub.s32 %seen, %seen, $2;
            setp.lt.s32 %again, %seen, 0;
            @%again bra LOOK;
            DONE:
            mov.b32 $0, 0;
            }""",
            "=r,l,r", [counter.to(tl.int64), target], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _read_row_chunks(x, stride, num_tokens, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
    """[ROWS, HIDDEN] as a tuple of pieces 128 wide: no width need be a power of two."""
    rows = tl.arange(0, ROWS)[:, None]
    place = x + rows * stride + tl.arange(0, 128)[None, :]
    chunks = (tl.load(place, rows < num_tokens, other=0.0, cache_modifier=".cg"),)
    for chunk in tl.static_range(1, HIDDEN // 128):
        chunks = chunks + (tl.load(place + chunk * 128, rows < num_tokens, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    return chunks


@triton.jit
def _read_weight(weight, tile, tiles, depth, across, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr):
    """[COLUMNS, HIDDEN] of a matrix [N, depth], in pieces: `across` tiles down its rows, then on to the right."""
    rows = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    columns = tile // across * HIDDEN + tl.arange(0, 128)
    place = weight + rows[:, None] * depth + columns[None, :]
    chunks = (tl.load(place, tile < tiles, other=0.0),)
    for chunk in tl.static_range(1, HIDDEN // 128):
        chunks = chunks + (tl.load(place + chunk * 128, tile < tiles, other=0.0),)  # noqa: RUF005
    return chunks


@triton.jit
def _multiply(x, w, HIDDEN: tl.constexpr):
    acc = tl.dot(x[0], w[0].T)
    for chunk in tl.static_range(1, HIDDEN // 128):
        acc = tl.dot(x[chunk], w[chunk].T, acc)
    return acc


@triton.jit
def _add(first, second, HIDDEN: tl.constexpr):
    total = (first[0].to(tl.float32) + second[0].to(tl.float32),)
    for chunk in tl.static_range(1, HIDDEN // 128):
        total = total + (first[chunk].to(tl.float32) + second[chunk].to(tl.float32),)  # noqa: RUF005
    return total


@triton.jit
def _read_embeddings(batch, tables, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
    ids, starts, _, num_tokens = batch
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 128)
    live = rows < num_tokens
    word = tl.load(ids + rows, live, other=0)[:, None] * HIDDEN + columns[None, :]
    row = tl.where(live, rows - tl.load(starts + rows, live, other=0), 0)[:, None] * HIDDEN + columns[None, :]
    words, positions = (tl.load(tables[0] + word),), (tl.load(tables[1] + row),)
    for chunk in tl.static_range(1, HIDDEN // 128):
        words = words + (tl.load(tables[0] + word + chunk * 128),)  # noqa: RUF005
        positions = positions + (tl.load(tables[1] + row + chunk * 128),)  # noqa: RUF005
    return _add(words, positions, HIDDEN)


@triton.jit
def _read_parts(parts, num_tokens, ROWS: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr):
    """The sum of what `_project_parts` wrote."""
    size: tl.constexpr = ROWS * HIDDEN
    zeros = tl.zeros([ROWS, 128], tl.float32)
    x = (zeros,)
    for _ in tl.static_range(1, HIDDEN // 128):
        x = x + (zeros,)  # noqa: RUF005
    for part in tl.static_range(0, PARTS):
        x = _add(x, _read_row_chunks(parts + part * size, HIDDEN, num_tokens, ROWS, HIDDEN), HIDDEN)
    return x


@triton.jit
def _normalize(x, norm, eps, dtype: tl.constexpr, HIDDEN: tl.constexpr):
    """Layer norm of float32 pieces, in `dtype`; `norm` is the scale, the shift lies behind it."""
    total = x[0]
    for chunk in tl.static_range(1, HIDDEN // 128):
        total += x[chunk]
    mean = (tl.sum(total, axis=1) / HIDDEN)[:, None]
    square = (x[0] - mean) * (x[0] - mean)
    for chunk in tl.static_range(1, HIDDEN // 128):
        square += (x[chunk] - mean) * (x[chunk] - mean)
    spread = tl.rsqrt(tl.sum(square, axis=1) / HIDDEN + eps)[:, None]
    normed = (_scale(x[0], mean, spread, norm, HIDDEN).to(dtype),)
    for chunk in tl.static_range(1, HIDDEN // 128):
        normed = normed + (_scale(x[chunk], mean, spread, norm + chunk * 128, HIDDEN).to(dtype),)  # noqa: RUF005
    return normed


@triton.jit
def _scale(x, mean, spread, norm, hidden):
    columns = tl.arange(0, 128)
    scale, shift = tl.load(norm + columns).to(tl.float32), tl.load(norm + hidden + columns).to(tl.float32)
    return (x - mean) * spread * scale[None, :] + shift[None, :]


@triton.jit
def _keep(x, state, num_tokens, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
    """Write x down, for a later step to add: program n its piece n."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, 128)[None, :]
    for chunk in tl.static_range(0, HIDDEN // 128):
        if tl.program_id(0) == chunk:
            tl.store(state + rows * HIDDEN + chunk * 128 + columns, x[chunk], rows < num_tokens)


@triton.jit
def _read(x, place, inside):
    """What other programs wrote: past the first cache, which does not hear of it."""
    return tl.load(x + place, inside, other=0.0, cache_modifier=".cg")


@triton.jit
def _attend(qkv, batch, out, head, hidden, scale, ROWS: tl.constexpr, D: tl.constexpr):
    """One head of all tokens: they are few enough that their scores fit."""
    _, starts, ends, num_tokens = batch
    rows, columns = tl.arange(0, ROWS), head * D + tl.arange(0, D)
    live = rows < num_tokens
    place = rows[:, None] * (3 * hidden) + columns[None, :]
    q, k = _read(qkv, place, live[:, None]), _read(qkv + hidden, place, live[:, None])
    v = _read(qkv + 2 * hidden, place, live[:, None])
    first, last = tl.load(starts + rows, live, other=0), tl.load(ends + rows, live, other=1)
    own = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
    scores = tl.where(own, tl.dot(q, k.T) * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    acc = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, axis=1)[:, None]
    tl.store(out + rows[:, None] * hidden + columns[None, :], acc.to(out.dtype.element_ty), live[:, None])


@triton.jit
def _project(
    x, w, weight, bias, out, residual, num_tokens, outputs: tl.constexpr,
    GELU: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """This program's columns of x @ weight.T + bias, with GELU or a residual; `w` is the weight of its first tile."""
    rows, tiles = tl.arange(0, ROWS)[:, None], outputs // COLUMNS
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        place = rows * outputs + columns[None, :]
        acc = _multiply(x, w, HIDDEN) + tl.load(bias + columns).to(tl.float32)[None, :]
        if GELU:
            acc = gelu(acc, FAST)
        if residual is not None:
            acc += _read(residual, place, rows < num_tokens).to(tl.float32)
        tl.store(out + place, acc.to(out.dtype.element_ty), rows < num_tokens)
        w = _read_weight(weight, tile + PROGRAMS, tiles, HIDDEN, tiles, COLUMNS, HIDDEN)


@triton.jit
def _project_parts(
    x, w, weight, bias, out, residual, num_tokens,
    INNER: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same from INNER columns, cut along the sum so that there is work for all: `out` is [parts, ROWS, H]."""
    rows, across = tl.arange(0, ROWS)[:, None], HIDDEN // COLUMNS
    tiles = across * (INNER // HIDDEN)
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        part, columns = tile // across, tile % across * COLUMNS + tl.arange(0, COLUMNS)
        place = rows * HIDDEN + columns[None, :]
        acc = _multiply(_read_row_chunks(x + part * HIDDEN, INNER, num_tokens, ROWS, HIDDEN), w, HIDDEN)
        if part == 0:
            acc += tl.load(bias + columns).to(tl.float32)[None, :]
            acc += _read(residual, place, rows < num_tokens).to(tl.float32)
        tl.store(out + part * ROWS * HIDDEN + place, acc.to(out.dtype.element_ty), rows < num_tokens)
        w = _read_weight(weight, tile + PROGRAMS, tiles, INNER, across, COLUMNS, HIDDEN)


@triton.jit
def _pool(x, offsets, out, row, ROWS: tl.constexpr, HIDDEN: tl.constexpr, POOLING: tl.constexpr, NORM: tl.constexpr):
    """The vector of sequence `row` of the normalised rows x."""
    begin, end, rows = tl.load(offsets + row), tl.load(offsets + row + 1), tl.arange(0, ROWS)
    if POOLING == "mean":
        wanted, count = (rows >= begin) & (rows < end), end - begin
    else:
        wanted, count = rows == (begin if POOLING == "cls" else end - 1), 1
    length = 0.0
    for chunk in tl.static_range(0, HIDDEN // 128):
        piece = tl.sum(tl.where(wanted[:, None], x[chunk].to(tl.float32), 0.0), axis=0) / count
        length += tl.sum(piece * piece, axis=0)
    length = tl.maximum(tl.sqrt(length), 1e-12) if NORM else 1.0
    place = out + row * HIDDEN + tl.arange(0, 128)
    for chunk in tl.static_range(0, HIDDEN // 128):
        piece = tl.sum(tl.where(wanted[:, None], x[chunk].to(tl.float32), 0.0), axis=0) / count
        tl.store(place + chunk * 128, piece / length, begin < end)


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
        _wait(counter, target, STEP)
        for row in range(tl.program_id(0), num_rows, PROGRAMS):
            x = _read_parts(parts, num_tokens, ROWS, HIDDEN, INNER // HIDDEN)
            x = _normalize(x, norms + 4 * num_layers * HIDDEN, eps, words.dtype.element_ty, HIDDEN)
            _pool(x, offsets, out, row, ROWS, HIDDEN, POOLING, NORMALIZE)


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
        w = _read_weight(weight, program, 3 * across, HIDDEN, 3 * across, COLUMNS, HIDDEN)
        _wait(counter, target, STEP)
        if program < 3 * across:
            if layer == 0:
                x = _read_embeddings(batch, tables, ROWS, HIDDEN)
            else:
                x = _read_parts(parts, num_tokens, ROWS, HIDDEN, INNER // HIDDEN)
            x = _normalize(x, norms + 4 * layer * HIDDEN, eps, state.dtype.element_ty, HIDDEN)
            _keep(x, state, num_tokens, ROWS, HIDDEN)
            _project(
                x, w, weight, bias, qkv, None, num_tokens, 3 * HIDDEN, False, False, ROWS, HIDDEN, COLUMNS, PROGRAMS
            )
        target = _arrive(counter, target, STEP, PROGRAMS)
    if STEP < 0 or STEP == 1:
        _wait(counter, target, STEP)
        for head in range(program, HEADS, PROGRAMS):
            _attend(qkv, batch, context, head, HIDDEN, scale, ROWS, HIDDEN // HEADS)
        target = _arrive(counter, target, STEP, PROGRAMS)
    if STEP < 0 or STEP == 2:
        weight, bias = out_weight + layer * HIDDEN * HIDDEN, out_bias + layer * HIDDEN
        w = _read_weight(weight, program, across, HIDDEN, across, COLUMNS, HIDDEN)
        _wait(counter, target, STEP)
        if program < across:
            x = _read_row_chunks(context, HIDDEN, num_tokens, ROWS, HIDDEN)
            _project(x, w, weight, bias, sums, state, num_tokens, HIDDEN, False, False, ROWS, HIDDEN, COLUMNS, PROGRAMS)
        target = _arrive(counter, target, STEP, PROGRAMS)
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
        w = _read_weight(weight, program, INNER // COLUMNS, HIDDEN, INNER // COLUMNS, COLUMNS, HIDDEN)
        _wait(counter, target, STEP)
        if program < INNER // COLUMNS:
            x = _read_parts(sums, num_tokens, ROWS, HIDDEN, 1)
            x = _normalize(x, norms + (4 * layer + 2) * HIDDEN, eps, state.dtype.element_ty, HIDDEN)
            _keep(x, state, num_tokens, ROWS, HIDDEN)
            _project(x, w, weight, bias, inner, None, num_tokens, INNER, True, FAST, ROWS, HIDDEN, COLUMNS, PROGRAMS)
        target = _arrive(counter, target, STEP, PROGRAMS)
    if STEP < 0 or STEP == 4:
        weight, bias = down_weight + layer * INNER * HIDDEN, down_bias + layer * HIDDEN
        w = _read_weight(weight, program, across * (INNER // HIDDEN), INNER, across, COLUMNS, HIDDEN)
        _wait(counter, target, STEP)
        _project_parts(inner, w, weight, bias, parts, state, num_tokens, INNER, ROWS, HIDDEN, COLUMNS, PROGRAMS)
        target = _arrive(counter, target, STEP, PROGRAMS)
    return target
