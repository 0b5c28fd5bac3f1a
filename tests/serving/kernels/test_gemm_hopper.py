"""The ping-pong GEMM against its twin, on a Hopper GPU: several tiles a program, and a last tile that is not full."""

import pytest
import torch

from serving.kernels import reference
from tests.serving.kernels.packs import NEEDS_HOPPER, assert_as_exact_as, draw, poisoned, relative_error

pytestmark = NEEDS_HOPPER
SHAPES = [(2049, 1536, 384), (6001, 384, 1536), (2560, 1152, 384), (1, 384, 384), (65, 768, 768)]
PROGRAMS = 132


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_equals_reference(rows: int, columns: int, depth: int, gelu: bool) -> None:
    from serving.kernels.gemm_hopper import linear

    x, weight, bias = draw(rows, depth), draw(columns, depth, scale=depth**-0.5), draw(columns)
    out = poisoned(rows, columns, device=x.device)
    linear(x, weight, bias, out, PROGRAMS, gelu)
    oracle = reference.linear(x.float(), weight.float(), bias.float(), gelu)
    assert_as_exact_as(out, reference.linear(x, weight, bias, gelu), oracle)
    upward = poisoned(rows, columns, device=x.device)
    linear(x, weight, bias, upward, PROGRAMS, gelu, is_upward=True)
    assert torch.equal(upward, out)


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_linear_adds_the_residual_in_place(rows: int, columns: int, depth: int) -> None:
    from serving.kernels.gemm_hopper import linear

    x, weight, total = draw(rows, depth), draw(columns, depth, scale=depth**-0.5), draw(rows, columns)
    plain, oracle = total + x @ weight.T, total.float() + x.float() @ weight.float().T
    linear(x, weight, None, total, PROGRAMS, residual=total)
    assert_as_exact_as(total, plain, oracle)


@pytest.mark.parametrize("by_rows", [False, True])
def test_linear_takes_and_gives_e4m3(by_rows: bool) -> None:
    from serving.kernels.gemm_hopper import linear

    x, weight, bias = draw(2100, 384), draw(1536, 384, scale=0.05), draw(1536)
    scales = x.float().abs().amax(1) / 448 if by_rows else x.float().abs().amax().reshape(1) / 448
    narrow = (x.float() / scales.reshape(-1, 1)).to(torch.float8_e4m3fn)
    weight_scale, factor = torch.tensor([0.005], device="cuda"), torch.tensor([30.0], device="cuda")
    small = (weight.float() / weight_scale).to(torch.float8_e4m3fn)
    out = torch.zeros(2100, 1536, dtype=torch.float8_e4m3fn, device="cuda")
    linear(narrow, small, bias, out, PROGRAMS, True, None, scales, weight_scale, factor)
    wide = narrow.float() * scales.reshape(-1, 1), small.float() * weight_scale, bias.float()
    assert relative_error(out.float() / factor, reference.linear(*wide, gelu=True)) < 0.03


def row_sums(x: torch.Tensor) -> torch.Tensor:
    parts = x.float().view(len(x), -1, 128)
    return torch.stack([parts.sum(2), (parts * parts).sum(2)], dim=2).contiguous()


@pytest.mark.parametrize("gelu", [False, True])
def test_linear_applies_the_layer_norm_of_its_input(gelu: bool) -> None:
    from serving.kernels.gemm_hopper import RowNorm, linear

    x, weight, bias, scale, shift = draw(2100, 384), draw(1152, 384, scale=0.05), draw(1152), draw(384), draw(384)
    folded = (weight.float() * scale.float()).half()
    total = (bias.float() + weight.float() @ shift.float()).half()
    norm = RowNorm(row_sums(x), folded.float().sum(1), 1e-12)
    out = poisoned(2100, 1152, device=x.device)
    linear(x, folded, total, out, PROGRAMS, gelu, norm=norm)
    normed = torch.nn.functional.layer_norm(x.float(), [384], scale.float(), shift.float(), 1e-12)
    oracle = reference.linear(normed, weight.float(), bias.float(), gelu)
    assert_as_exact_as(out, reference.linear(normed.half(), weight, bias, gelu), oracle)


def test_linear_applies_the_layer_norm_of_the_residual_and_sums_what_it_writes() -> None:
    from serving.kernels.gemm_hopper import RowNorm, linear

    x, weight, bias, y = draw(2100, 1536), draw(384, 1536, scale=0.02), draw(384), draw(2100, 384)
    scale = draw(384)
    normed = torch.nn.functional.layer_norm(y.float(), [384], scale.float(), None, 1e-12)
    oracle = x.float() @ weight.float().T + bias.float() + normed
    plain = x @ weight.T + bias + normed.half()
    sums = poisoned(2100, 3, 2, device=x.device, dtype=torch.float32)
    norm = RowNorm(row_sums(y), scale.float(), 1e-12)
    linear(x, weight, bias, y, PROGRAMS, residual=y, norm=norm, out_sums=sums)
    assert_as_exact_as(y, plain, oracle)
    torch.testing.assert_close(sums, row_sums(oracle), rtol=1e-2, atol=0.5)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (x.float().abs().amax() / 448).reshape(1)
    return reference.quantize_tensor(x, scale), scale


def test_linear_applies_the_layer_norm_of_its_e4m3_input() -> None:
    from serving.kernels.gemm_hopper import RowNorm, linear

    x, weight, bias = draw(2100, 384), draw(1536, 384, scale=0.05), draw(1536)
    (values, x_scale), (small, weight_scale) = quantize(x), quantize(weight)
    norm, out = RowNorm(row_sums(x), small.float().sum(1), 1e-12), poisoned(2100, 1536, device=x.device)
    linear(values, small, bias, out, PROGRAMS, True, None, x_scale, weight_scale, norm=norm)
    normed = (values.float() * x_scale - x.float().mean(1, keepdim=True)) / x.float().std(1, correction=0, keepdim=True)
    oracle = reference.linear(normed, small.float() * weight_scale, bias.float(), gelu=True)
    assert relative_error(out, oracle) < 1e-3


@pytest.mark.parametrize("depth", [384, 1536])
def test_linear_copies_its_result_in_e4m3(depth: int) -> None:
    from serving.kernels.gemm_hopper import linear

    x, weight, residual = draw(2100, depth), draw(384, depth, scale=0.02), draw(2100, 384)
    (values, x_scale), (small, weight_scale) = quantize(x), quantize(weight)
    copy, factor = torch.zeros(2100, 384, dtype=torch.float8_e4m3fn, device=x.device), torch.tensor([20.0]).cuda()
    oracle = (values.float() * x_scale) @ (small.float() * weight_scale).T + residual.float()
    scales = {"x_scales": x_scale, "weight_scale": weight_scale}
    linear(values, small, None, residual, PROGRAMS, residual=residual, out_factor=factor, copy=copy, **scales)
    assert relative_error(residual, oracle) < 1e-3
    assert relative_error(copy.float() / factor, oracle) < 0.03
