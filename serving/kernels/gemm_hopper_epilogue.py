"""What `gemm_hopper` does to a tile behind its product: scales, layer norms, bias, GELU, residual and row sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_A, _B = gl.constexpr(0.79862082), gl.constexpr(0.0355207)


@gluon.jit
def _gelu(half):
    """The fast form of `gemm.gelu`, of half of x."""
    inner = half * (2.0 * _A + half * half * (8.0 * _B))
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=gl.float32, is_pure=True, pack=1)
    return half + half * tanh


@gluon.jit
def read_columns(
    bias_at, factors, left, layout: gl.constexpr, COLUMNS: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
    NORM: gl.constexpr,
):  # fmt: skip
    """What the epilogue needs of the columns: the bias, half of it for a GELU, and the norm's factors."""
    columns = left + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    bias = gl.zeros([COLUMNS], gl.float32, gl.SliceLayout(0, layout))
    factor = gl.zeros([COLUMNS], gl.float32, gl.SliceLayout(0, layout))
    if BIAS:
        bias = gl.load(bias_at + columns).to(gl.float32) * (0.5 if GELU else 1.0)
    if NORM != "none":
        factor = gl.load(factors + columns).to(gl.float32)
    return bias, factor


@gluon.jit
def read_rows(
    epilogue, norms, top, layout: gl.constexpr, ROWS: gl.constexpr, GELU: gl.constexpr, SCALES: gl.constexpr,
    NORM: gl.constexpr, HIDDEN: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """What the epilogue needs of the rows, read before the turn so that it waits for nothing: what the product is to be
    multiplied by, and of the norm mean and reciprocal spread, from the sums over PARTS of their columns. A norm of
    x holds the scales of E4M3 operands itself. A GELU takes half of its argument."""
    _, x_scales, weight_scale, _, num_rows = epilogue
    sums, _, eps, _ = norms
    rows = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    live = rows < num_rows
    scale = gl.full([ROWS], 0.5 if GELU else 1.0, gl.float32, gl.SliceLayout(1, layout))
    mean = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    spread = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    if SCALES == "rows":
        scale = scale * gl.load(x_scales + rows, live, other=0.0) * gl.load(weight_scale)
    elif SCALES == "tensor":
        scale = scale * (gl.load(x_scales) * gl.load(weight_scale))
    if NORM != "none":
        for part in gl.static_range(PARTS):
            place = sums + (rows * PARTS + part) * 2
            mean += gl.load(place, live, other=0.0) / HIDDEN
            spread += gl.load(place + 1, live, other=0.0) / HIDDEN
        spread = gl.rsqrt(spread - mean * mean + eps)
    if NORM == "x":
        spread = spread * scale
        if SCALES == "tensor":
            mean = mean / gl.load(x_scales)
    return scale, mean, spread


@gluon.jit
def finish(acc, of_columns, of_rows, BIAS: gl.constexpr, GELU: gl.constexpr, SCALES: gl.constexpr, NORM: gl.constexpr):
    """Layer norm or scales of the operands, bias and activation."""
    bias, factor = of_columns
    scale, mean, spread = of_rows
    if NORM == "x":
        acc = (acc - mean[:, None] * factor[None, :]) * spread[:, None]
    elif SCALES != "none" or GELU:
        acc = acc * scale[:, None]
    if BIAS:
        acc = acc + bias[None, :]
    if GELU:
        acc = _gelu(acc)
    return acc


@gluon.jit
def normalize(residual, of_columns, of_rows, NORM: gl.constexpr):
    """The residual behind its norm, whose shift is in the bias."""
    if NORM == "residual":
        residual = (residual - of_rows[1][:, None]) * of_rows[2][:, None] * of_columns[1][None, :]
    return residual


@gluon.jit
def store_sums(x, sums, num_rows, top, left, layout: gl.constexpr, HIDDEN: gl.constexpr):
    """Sum and sum of squares of each row over this tile's columns, for the layer norm of who reads them."""
    rows = top + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))
    place = sums + (rows * (HIDDEN // 128) + left // 128) * 2
    gl.store(place, gl.sum(x, axis=1), rows < num_rows)
    gl.store(place + 1, gl.sum(x * x, axis=1), rows < num_rows)
