"""What the programs of `few_tokens` do in their steps, and how they meet between them.

Rows are tuples of pieces 128 wide, so that a width need be no power of two. What another program wrote is read past the
first cache, which does not hear of it.
"""

import triton
import triton.language as tl

from serving.kernels.gemm import gelu


@triton.jit
def arrive(counter, target, STEP: tl.constexpr, PROGRAMS: tl.constexpr):
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
def wait(counter, target, STEP: tl.constexpr):
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
def read_row_chunks(x, stride, num_tokens, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
    """[ROWS, HIDDEN] as a tuple of pieces 128 wide: no width need be a power of two."""
    rows = tl.arange(0, ROWS)[:, None]
    place = x + rows * stride + tl.arange(0, 128)[None, :]
    chunks = (tl.load(place, rows < num_tokens, other=0.0, cache_modifier=".cg"),)
    for chunk in tl.static_range(1, HIDDEN // 128):
        chunks = chunks + (tl.load(place + chunk * 128, rows < num_tokens, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    return chunks


@triton.jit
def read_weight(weight, tile, tiles, depth, across, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr):
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
def read_embeddings(batch, tables, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
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
def read_parts(parts, num_tokens, ROWS: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr):
    """The sum of what `project_parts` wrote."""
    size: tl.constexpr = ROWS * HIDDEN
    zeros = tl.zeros([ROWS, 128], tl.float32)
    x = (zeros,)
    for _ in tl.static_range(1, HIDDEN // 128):
        x = x + (zeros,)  # noqa: RUF005
    for part in tl.static_range(0, PARTS):
        x = _add(x, read_row_chunks(parts + part * size, HIDDEN, num_tokens, ROWS, HIDDEN), HIDDEN)
    return x


@triton.jit
def normalize(x, norm, eps, dtype: tl.constexpr, HIDDEN: tl.constexpr):
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
def keep(x, state, num_tokens, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
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
def attend(qkv, batch, out, head, hidden, scale, ROWS: tl.constexpr, D: tl.constexpr):
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
def project(
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
        w = read_weight(weight, tile + PROGRAMS, tiles, HIDDEN, tiles, COLUMNS, HIDDEN)


@triton.jit
def project_parts(
    x, w, weight, bias, out, residual, num_tokens,
    INNER: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same from INNER columns, cut along the sum so that there is work for all: `out` is [parts, ROWS, H]."""
    rows, across = tl.arange(0, ROWS)[:, None], HIDDEN // COLUMNS
    tiles = across * (INNER // HIDDEN)
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        part, columns = tile // across, tile % across * COLUMNS + tl.arange(0, COLUMNS)
        place = rows * HIDDEN + columns[None, :]
        acc = _multiply(read_row_chunks(x + part * HIDDEN, INNER, num_tokens, ROWS, HIDDEN), w, HIDDEN)
        if part == 0:
            acc += tl.load(bias + columns).to(tl.float32)[None, :]
            acc += _read(residual, place, rows < num_tokens).to(tl.float32)
        tl.store(out + part * ROWS * HIDDEN + place, acc.to(out.dtype.element_ty), rows < num_tokens)
        w = read_weight(weight, tile + PROGRAMS, tiles, INNER, across, COLUMNS, HIDDEN)


@triton.jit
def pool(x, offsets, out, row, ROWS: tl.constexpr, HIDDEN: tl.constexpr, POOLING: tl.constexpr, NORM: tl.constexpr):
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
