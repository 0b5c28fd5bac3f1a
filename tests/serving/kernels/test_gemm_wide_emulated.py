"""The kernel of `gemm_wide` itself, without a GPU: see `emulate`."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.kernels import gemm_wide, reference
from tests.serving.kernels.emulate import NEEDS_COMPILER, EmulatedKernel, Schedule, emulate
from tests.serving.kernels.packs import activate, in_order, narrow, poisoned, quantize, relative_error, sum_rows

pytestmark = NEEDS_COMPILER
COLUMNS, EPS = 384, 1e-12  # two tiles
ROWS = 340  # two tiles and one of 84 rows
PRODUCER, ATTENDING, FIRST_GROUP, SECOND_GROUP = 1, 2 | 4, 0xF0, 0xF00  # warps
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Product:
    """x before its norm, or as it is; the values that are multiplied, with their scales where they are E4M3."""

    x: Tensor
    left: Tensor
    right: Tensor
    scales: tuple[Tensor | None, Tensor | None]
    bias: Tensor

    @property
    def plain(self) -> Tensor:
        """Float32, without a norm."""
        product = self.left.float() @ self.right.float().T
        return product if self.scales[0] is None else product * self.scales[0][..., None] * self.scales[1]


@pytest.fixture(autouse=True)
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(gemm_wide, folder, monkeypatch)


def make_product(depth: int, is_e4m3: bool, has_row_scales: bool = False) -> Product:
    x, weight = (torch.randn(ROWS, depth) + 0.1).half(), (torch.randn(COLUMNS, depth) * depth**-0.5).half()
    bias = torch.randn(COLUMNS).half()
    if not is_e4m3:
        return Product(x, x, weight, (None, None), bias)
    left, right = reference.quantize_rows(x) if has_row_scales else quantize(x), quantize(weight)
    return Product(x, left[0], right[0], (left[1].reshape(-1), right[1]), bias)


def linear(product: Product, rows: slice, programs: int, factor: Tensor | None, **how: bool) -> Tensor:
    left, (x_scales, weight_scale) = product.left[rows].contiguous(), product.scales
    if x_scales is not None and len(x_scales) > 1:
        x_scales = x_scales[rows].contiguous()
    out, sums = poisoned(len(left), COLUMNS, device=CPU), sum_rows(product.x[rows], 64)
    if factor is not None:
        out = out.to(torch.float8_e4m3fn)
    gemm_wide.linear(
        left, product.right, product.bias, out, programs, sums, EPS,
        x_scales=x_scales, weight_scale=weight_scale, out_factor=factor, **how,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Added:
    """What `add` leaves."""

    total: Tensor
    sums: Tensor
    copy: Tensor | None


def add(
    product: Product, residual: Tensor, scale: Tensor, rows: slice, programs: int, factor: Tensor | None, up: bool
) -> Added:
    total, left = residual[rows].clone(), product.left[rows].contiguous()
    out_sums = poisoned(len(left) + 128, 2, 2, device=CPU, dtype=torch.float32)
    copy = None if factor is None else poisoned(len(left), COLUMNS, device=CPU).to(torch.float8_e4m3fn)
    gemm_wide.add(
        left, product.right, product.bias, total, programs, sum_rows(residual[rows]), scale, EPS, out_sums, up,
        *product.scales, factor, copy,
    )  # fmt: skip
    assert bool(out_sums[len(left) :].isnan().all())
    return Added(total, out_sums[: len(left)], copy)


def find_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each row, from its sums."""
    mean, square = x.float().mean(1, keepdim=True), x.float().square().mean(1, keepdim=True)
    return mean, (square - mean.square() + EPS).rsqrt()


@pytest.mark.parametrize(
    ("gelu", "is_e4m3", "factor", "programs", "schedule"),
    [
        (False, False, None, 4, Schedule(0, ATTENDING)),  # a round of tiles, then two tiles as four halves
        (True, False, None, 3, Schedule(1, PRODUCER)),  # two rounds of tiles, from the last row up
        (True, True, 40.0, 4, Schedule(2, FIRST_GROUP)),
        (False, True, None, 2, Schedule(1, SECOND_GROUP)),
        (True, False, 40.0, 6, Schedule(0, SECOND_GROUP | ATTENDING)),
    ],
)
def test_emulated_linear_equals_plain_in_any_schedule(
    gelu: bool, is_e4m3: bool, factor: float | None, programs: int, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedKernel, "schedule", schedule)
    product, by = make_product(384, is_e4m3), None if factor is None else torch.tensor([factor])
    plain = product.plain * find_norm(product.x)[1] + product.bias.float()
    plain = activate((plain / 2).half()) if gelu else plain.half()
    out = linear(product, slice(None), programs, by, gelu=gelu, is_upward=schedule.seed == 1)
    if by is None:
        assert relative_error(out, plain) < 1e-4
    else:
        assert relative_error(in_order(out), narrow(plain, by)) < 1e-3


@pytest.mark.parametrize(
    ("depth", "is_e4m3", "factor", "programs", "schedule"),
    [
        (384, False, None, 4, Schedule(0, ATTENDING)),
        (384, True, None, 2, Schedule(1, PRODUCER)),
        (384, True, 24.0, 4, Schedule(2, FIRST_GROUP)),  # copies through shared memory
        (1536, True, 24.0, 4, Schedule(1, SECOND_GROUP)),  # copies by threads
    ],
)
def test_emulated_add_equals_plain_in_any_schedule(
    depth: int, is_e4m3: bool, factor: float | None, programs: int, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedKernel, "schedule", schedule)
    product, by = make_product(depth, is_e4m3), None if factor is None else torch.tensor([factor])
    residual, scale = (torch.randn(ROWS, COLUMNS) * 3 - 0.5).half(), torch.randn(COLUMNS).half()
    mean, spread = find_norm(residual)
    plain = product.plain + (residual.float() - mean) * spread * scale.float() + product.bias.float()
    result = add(product, residual, scale, slice(None), programs, by, schedule.seed == 1)
    assert relative_error(result.total, plain.half()) < 1e-4
    assert relative_error(result.sums, sum_rows(plain)) < 1e-4
    if by is not None:
        assert result.copy is not None
        assert relative_error(in_order(result.copy), narrow(plain.half(), by)) < 1e-3


def test_emulated_takes_a_scale_of_each_row() -> None:
    product = make_product(384, True, has_row_scales=True)
    plain = product.plain * find_norm(product.x)[1] + product.bias.float()
    assert relative_error(linear(product, slice(None), 6, None), plain.half()) < 1e-4


@pytest.mark.parametrize("rows", [slice(ROWS - 1, ROWS), slice(64, 129), slice(0, 320)])
def test_emulated_rows_have_the_same_bits_in_any_place(rows: slice) -> None:
    """Alone, across the edge of a half, and in halves instead of whole tiles."""
    product, factor = make_product(384, True), torch.tensor([24.0])
    residual, scale = torch.randn(ROWS, COLUMNS).half(), torch.randn(COLUMNS).half()
    whole = linear(product, slice(None), 3, factor, gelu=True)
    part = linear(product, rows, 16, factor, gelu=True, is_upward=True)
    assert torch.equal(part.view(torch.uint8), whole[rows].view(torch.uint8))
    together = add(product, residual, scale, slice(None), 2, factor, False)
    apart = add(product, residual, scale, rows, 16, factor, True)
    assert torch.equal(apart.total, together.total[rows])
    assert torch.equal(apart.sums, together.sums[rows])
    assert apart.copy is not None
    assert together.copy is not None
    assert torch.equal(apart.copy.view(torch.uint8), together.copy[rows].view(torch.uint8))
