"""GEMM of normalised rows for Hopper (capability 9.0) in CUDA C++: see gemm_wide.cu.

Faster than `gemm_hopper` where that one has to stream its weights: Triton has no tiles of 192 columns. A last round of
few tiles is cut in halves for more programs; a row's bits depend on neither that nor the other rows.

E4M3 that it writes has the columns of each 64 in the order 0 1 8 9 16 17 .. 56 57 2 3 10 11 .., those side by side that
the tensor cores leave to a thread: a weight that multiplies it is brought into that order by `reorder`, once.
"""

import ctypes
from collections.abc import Collection
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from serving.kernels.compiled import CudaKernel, TensorMap, load_beside
from serving.kernels.gemm import is_hopper
from serving.kernels.handover import starts_early

COLUMNS = 192  # of a tile, and of what each pair of sums is over
_ROWS, _HALF, _PIECE = 128, 64, 64  # of a tile, its halves, and the columns of what is read and written at a time
_STEP_BYTES = 128  # of a tile's row in the ring: one swizzle span
_LEAST_DEPTH = 512  # below it `gemm_hopper` keeps its weights in shared memory, which measured faster
_LEAST_COLUMNS_E4M3 = 768  # E4M3 takes it for any number of rows, of which few have too few tiles with fewer columns
_LEAST_DEEP = 1536  # columns of x from which another stage of the ring measured faster than copies by the copy engine
_OTHER_TILE = 128 * 128  # values of a tile of `gemm_hopper`
_THREADS, _SHARED_BYTES = 384, 227 * 1024


class Form(NamedTuple):
    """What is compiled by itself: `add` or `linear`, operands in E4M3 or not, and a result that is, or a copy of it,
    and how the latter is written."""

    adds: bool
    gelu: bool
    takes_e4m3: bool
    gives_e4m3: bool
    is_deep: bool = False

    @classmethod
    def of(cls, weight: Tensor, adds: bool, gelu: bool, gives_e4m3: bool) -> "Form":
        """For products by the weight [N, K]."""
        is_deep = adds and gives_e4m3 and weight.shape[1] >= _LEAST_DEEP
        return cls(adds, gelu, weight.dtype == torch.float8_e4m3fn, gives_e4m3, is_deep)


class _Argument(ctypes.Structure):
    """`Argument` of the kernel."""

    _fields_ = [
        *((name, TensorMap) for name in ("x", "weight", "out", "residual", "copy")),
        ("narrow", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("bias", "scales", "sums", "out_sums")),
        *((name, ctypes.c_void_p) for name in ("x_scales", "weight_scale", "out_factor")),
        *((name, ctypes.c_float) for name in ("eps", "share")),
        *((name, ctypes.c_int) for name in ("num_rows", "tiles", "cut")),
        *((name, ctypes.c_int) for name in ("across", "last", "depth", "parts", "scale_rows")),
        ("rest", ctypes.c_char * 24),  # tensor maps make the kernel's struct a multiple of 64 bytes
    ]


def fits(weight: Tensor, device: torch.device) -> bool:
    """Whether the kernel takes a weight [N, K] on the device, and is the faster one for it."""
    columns, depth = weight.shape
    is_e4m3 = weight.dtype == torch.float8_e4m3fn
    if not (is_e4m3 or weight.dtype == torch.float16) or not is_hopper(device):
        return False
    if is_e4m3 and columns < _LEAST_COLUMNS_E4M3:
        return False
    is_whole = columns % COLUMNS == 0 and depth * weight.element_size() % _STEP_BYTES == 0
    return is_whole and depth >= _LEAST_DEPTH


def least_rows(columns: int, num_programs: int) -> int:
    """Rows that are enough for its tiles: `gemm_hopper` has more of them, which fill the processors sooner."""
    return num_programs * _OTHER_TILE // columns + 1


def count_cut(tiles: int, num_programs: int) -> int:
    """How many tiles are cut in halves: those of the last round, if they are at most half as many as the programs."""
    last = tiles % num_programs
    return last if 2 * last <= num_programs else 0


def reorder(weight: Tensor) -> Tensor:
    """A weight [N, K] for an x in the order in which E4M3 is written here; K in multiples of 64."""
    return weight.unflatten(1, (-1, 8, 4, 2)).transpose(2, 3).flatten(1).contiguous()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, num_programs: int, sums: Tensor, eps: float,
    gelu: bool = False, is_upward: bool = False, x_scales: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None,
) -> None:  # fmt: skip
    """norm(x) @ weight.T + bias, with GELU when `gelu`: x [T, K], weight [N, K], bias [N], out [T, N], all float16.

    The norm's scale is in the weight, whose rows sum to 0, and its shift in the bias. `sums` (float32 [T, parts, 2]):
    sum and sum of squares of each row of x, in parts. `num_programs`: multiprocessors. `is_upward` begins with the
    last rows: those that whoever wrote x downward left in the second cache. x and weight may be E4M3, to be multiplied
    by `x_scales` (float32, of x [1] or of its rows [T]) and `weight_scale` [1]; of a GELU `out` may be E4M3, which
    takes the result times `out_factor` (float32 [1], at most 65504), in the module's order. Raises CompileFailed.
    """
    form = Form.of(weight, False, gelu, out_factor is not None)
    pieces = TensorMap.of(out, _HALF, _PIECE)
    vectors = None, bias, None, sums, None, x_scales, weight_scale, out_factor
    _launch(form, x, weight, (pieces, pieces, pieces), vectors, num_programs, x.shape[1], eps, is_upward)


def add(
    x: Tensor, weight: Tensor, bias: Tensor, total: Tensor, num_programs: int, sums: Tensor, scale: Tensor, eps: float,
    out_sums: Tensor, is_upward: bool = False, x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None, copy: Tensor | None = None,
) -> None:  # fmt: skip
    """total = norm(total) + x @ weight.T + bias in place: x [T, K], weight [N, K], bias [N], total [T, N].

    `scale` (float16 [N]) is the norm's; its shift is in the bias. `sums` as of `linear`, of `total`; `out_sums`
    (float32 [T, N / COLUMNS, 2]) takes those of the result. x and weight may be E4M3 with float32 [1] scales. `copy`
    (E4M3 [T, N]) takes the result times `out_factor` as of `linear`. Raises CompileFailed.
    """
    form = Form.of(weight, True, False, copy is not None)
    num_programs -= num_programs % (len(weight) // COLUMNS)  # a program keeps its column
    pieces = TensorMap.of(total, _HALF, _PIECE)
    copies = pieces if copy is None else TensorMap.of(copy, _HALF, _PIECE)
    vectors = copy, bias, scale, sums, out_sums, x_scale, weight_scale, out_factor
    _launch(form, x, weight, (pieces, pieces, copies), vectors, num_programs, len(weight), eps, is_upward)


def prepare(device: torch.device, forms: Collection[Form]) -> None:
    """Compile the forms, beside each other. Raises CompileFailed."""
    load_beside(partial(_load, device), forms)


def make_macros(form: Form) -> dict[str, int]:
    """What the kernel is compiled with."""
    names = "RESIDUAL", "GELU", "E4M3", "NARROW", "DEEP"
    return {name: int(value) for name, value in zip(names, form, strict=True)}


@cache
def _load(device: torch.device, form: Form) -> CudaKernel:
    return CudaKernel("gemm_wide", make_macros(form), device, _THREADS, _SHARED_BYTES)


def _launch(
    form: Form, x: Tensor, weight: Tensor, results: tuple[TensorMap, TensorMap, TensorMap],
    vectors: tuple[Tensor | None, ...], num_programs: int, normed: int, eps: float, is_upward: bool,
) -> None:  # fmt: skip
    """`results`: out, residual and copy; `vectors` in the order of the argument; `normed` columns have the norm."""
    (num_rows, depth), across = x.shape, len(weight) // COLUMNS
    down, step = -(-num_rows // _ROWS), _STEP_BYTES // x.element_size()
    tiles = down * across
    cut = count_cut(tiles, num_programs)
    _, _, _, sums, _, x_scales, _, _ = vectors
    assert sums is not None
    pointers: list[Any] = [None if each is None else each.data_ptr() for each in vectors]
    has_row_scales = x_scales is not None and x_scales.numel() > 1
    argument = _Argument(
        TensorMap.of(x, _HALF, step), TensorMap.of(weight, COLUMNS, step), *results, *pointers,
        eps, 1 / normed, num_rows, tiles, cut, across, down - 1 if is_upward else -1, depth // step, sums.shape[1],
        has_row_scales,
    )  # fmt: skip
    _load(x.device, form).launch(argument, min(num_programs, tiles + cut), starts_early(x))
