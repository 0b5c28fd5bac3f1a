"""E4M3 in and out of the GEMM with tiles of 192 columns, on a Hopper GPU: tiles not full, several a program."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from serving.kernels import gemm_wide, reference
from tests.serving.kernels.packs import (
    HALVED_ROWS,
    NEEDS_HOPPER,
    draw,
    in_order,
    poisoned,
    quantize,
    relative_error,
    sum_rows,
)

pytestmark = NEEDS_HOPPER
PROGRAMS, EPS = 132, 1e-12
ROWS = [1, 127, 2049, 40_001]
E4M3 = torch.float8_e4m3fn


def poisoned_e4m3(rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns), 0x7F, dtype=torch.uint8, device="cuda").view(E4M3)  # NaN


def make_product(rows: int, columns: int, depth: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """x as float16, and in E4M3, a centred weight in E4M3, and both scales."""
    x, weight = draw(rows, depth) + 0.1, draw(columns, depth, scale=depth**-0.5).float()
    (values, x_scale), (small, weight_scale) = quantize(x), quantize(weight - weight.mean(1, keepdim=True))
    return x, values, small, (x_scale, weight_scale)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("columns", "depth"), [(1152, 384), (2304, 768), (3072, 768)])
@pytest.mark.parametrize("gives", ["query", "up", "narrow"])
def test_linear_normalises_its_input(rows: int, columns: int, depth: int, gives: str) -> None:
    (x, values, small, scales), bias, gelu = make_product(rows, columns, depth), draw(columns), gives != "query"
    spread = torch.rsqrt(x.float().var(1, correction=0, keepdim=True) + EPS)
    product = (values.float() * scales[0]) @ (small.float() * scales[1]).T * spread + bias.float()
    oracle = torch.nn.functional.gelu(product) if gelu else product
    factor = torch.tensor([300.0], device=x.device) if gives == "narrow" else None  # some are cut
    sums, results = sum_rows(x), []
    for up in (False, True):
        out = poisoned_e4m3(rows, columns) if gives == "narrow" else poisoned(rows, columns, device=x.device)
        gemm_wide.linear(values, small, bias, out, PROGRAMS, sums, EPS, gelu, up, *scales, factor)
        results.append(out.float())
    assert torch.equal(*results)
    if factor is None:
        assert relative_error(results[0], oracle) < 2e-3
    else:
        cut = (oracle * factor).clamp(-reference.E4M3_MAX, reference.E4M3_MAX)
        assert relative_error(in_order(results[0]), cut) < 0.03


@pytest.mark.parametrize("rows", ROWS)
def test_linear_takes_a_scale_of_each_row(rows: int) -> None:
    x, weight, bias = draw(rows, 768), draw(2304, 768, scale=0.03), draw(2304)
    (values, scales), (small, weight_scale) = reference.quantize_rows(x), quantize(weight)
    plain = torch.tensor([0.0, 768.0], device=x.device).repeat(rows, 1, 1)
    out = poisoned(rows, 2304, device=x.device)
    scales = scales[:, 0].contiguous()
    gemm_wide.linear(values, small, bias, out, PROGRAMS, plain, EPS, False, False, scales, weight_scale)
    oracle = (values.float() * scales[:, None]) @ (small.float() * weight_scale).T + bias.float()
    assert relative_error(out, oracle) < 2e-3


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("columns", "depth", "part"), [(384, 384, 128), (384, 1536, 192), (768, 768, 192)])
@pytest.mark.parametrize("copies", [False, True])
def test_add_normalises_the_residual_and_copies_what_it_writes(
    rows: int, columns: int, depth: int, part: int, copies: bool
) -> None:
    (_, values, small, scales), bias = make_product(rows, columns, depth), draw(columns)
    total, scale = draw(rows, columns) * 3 - 0.5, draw(columns)
    normed = layer_norm(total.float(), [columns], scale.float(), None, EPS)
    oracle = (values.float() * scales[0]) @ (small.float() * scales[1]).T + bias.float() + normed
    sums, factor = sum_rows(total, part), torch.tensor([20.0], device=total.device)
    out_sums = poisoned(rows, columns // gemm_wide.COLUMNS, 2, device=total.device, dtype=torch.float32)
    copy = poisoned_e4m3(rows, columns) if copies else None
    gemm_wide.add(
        values,
        small,
        bias,
        total,
        PROGRAMS,
        sums,
        scale,
        EPS,
        out_sums,
        False,
        *scales,
        factor if copies else None,
        copy,
    )
    assert relative_error(total, oracle) < 2e-3
    torch.testing.assert_close(out_sums, sum_rows(oracle), rtol=1e-2, atol=0.5)
    if copy is not None:
        assert relative_error(in_order(copy) / factor, oracle) < 0.03


def test_float16_gives_e4m3() -> None:
    """Where only some of a model's linears are E4M3."""
    x, weight, bias, factor = draw(2049, 768), draw(3072, 768, scale=0.03), draw(3072), draw(1).abs().float() + 20
    out, plain = poisoned_e4m3(2049, 3072), torch.tensor([0.0, 768.0], device=x.device).repeat(2049, 1, 1)
    gemm_wide.linear(x, weight, bias, out, PROGRAMS, plain, EPS, True, out_factor=factor)
    assert (
        relative_error(in_order(out) / factor, reference.linear(x.float(), weight.float(), bias.float(), True)) < 0.03
    )
    down, total, scale = draw(768, 3072, scale=0.02), draw(2049, 768), draw(768)
    inner, copy = draw(2049, 3072), poisoned_e4m3(2049, 768)
    oracle = inner.float() @ down.float().T + layer_norm(total.float(), [768], scale.float(), None, EPS)
    none, out_sums = torch.zeros(768, device=x.device).half(), sum_rows(total)
    gemm_wide.add(
        inner, down, none, total, PROGRAMS, sum_rows(total), scale, EPS, out_sums, out_factor=factor, copy=copy
    )
    assert relative_error(total, oracle) < 2e-3
    assert relative_error(in_order(copy) / factor, oracle) < 0.03


def test_a_row_has_the_same_bits_in_any_company() -> None:
    (x, values, small, scales), bias = make_product(5000, 3072, 768), draw(3072)
    factor, sums = torch.tensor([40.0], device=x.device), sum_rows(x)
    whole, part = poisoned_e4m3(5000, 3072), poisoned_e4m3(3, 3072)
    gemm_wide.linear(values, small, bias, whole, PROGRAMS, sums, EPS, True, False, *scales, factor)
    some = values[4001:4004].contiguous(), small, bias, part, PROGRAMS, sums[4001:4004].contiguous()
    gemm_wide.linear(*some, EPS, True, False, *scales, factor)
    assert torch.equal(part.view(torch.uint8), whole[4001:4004].view(torch.uint8))


@pytest.mark.parametrize("is_upward", [False, True])
@pytest.mark.parametrize("rows", HALVED_ROWS)
@pytest.mark.parametrize("depth", [768, 1536])  # whose copies are written in two ways
def test_halves_have_the_bits_of_whole_tiles(rows: int, is_upward: bool, depth: int) -> None:
    """Whole tiles: with rows that fill them, in full rounds of one row of tiles."""
    filled = -(-rows // 128) * 128
    (x, values, up, scales), bias = make_product(filled, 3072, depth), draw(3072)
    (down, down_scale), total, scale = quantize(draw(768, depth)), draw(filled, 768), draw(768)
    factor, results = torch.tensor([40.0], device=x.device), []
    sums, before = sum_rows(x), sum_rows(total)
    for size, programs in ((filled, (16, 4)), (rows, (PROGRAMS, PROGRAMS))):
        out, added, copy = poisoned_e4m3(size, 3072), total[:size].clone(), poisoned_e4m3(size, 768)
        after = poisoned(size, 4, 2, device=x.device, dtype=torch.float32)
        gemm_wide.linear(
            values[:size], up, bias, out, programs[0], sums[:size], EPS, True, is_upward, *scales, factor
        )  # fmt: skip
        gemm_wide.add(
            values[:size], down, bias[:768], added, programs[1], before[:size], scale, EPS, after, is_upward,
            scales[0], down_scale, factor, copy,
        )  # fmt: skip
        bits = out.view(torch.uint8), copy.view(torch.uint8), added, after
        results.append([each[:rows] for each in bits])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_was_written_is_read_by_a_reordered_weight() -> None:
    (x, values, small, scales), bias = make_product(2049, 3072, 768), draw(3072)
    factor, inner = torch.tensor([40.0], device=x.device), poisoned_e4m3(2049, 3072)
    gemm_wide.linear(values, small, bias, inner, PROGRAMS, sum_rows(x), EPS, True, False, *scales, factor)
    (down, down_scale), total, scale = quantize(draw(768, 3072)), draw(2049, 768), draw(768)
    normed = layer_norm(total.float(), [768], scale.float(), None, EPS)
    oracle = in_order(inner) / factor @ (down.float() * down_scale).T + normed
    none, out_sums = torch.zeros(768, device=x.device).half(), sum_rows(total)
    gemm_wide.add(
        inner, gemm_wide.reorder(down), none, total, PROGRAMS, sum_rows(total), scale, EPS, out_sums, False,
        1 / factor, down_scale,
    )  # fmt: skip
    assert relative_error(total, oracle) < 2e-3


def test_what_does_not_fit_goes_elsewhere() -> None:
    device = torch.device("cuda")
    assert gemm_wide.fits(draw(2304, 768).to(E4M3), device)
    assert not gemm_wide.fits(draw(2304, 448).to(E4M3), device)  # not whole steps of the ring
    assert not gemm_wide.fits(draw(1024, 1024).to(E4M3), device)
    assert not gemm_wide.fits(draw(384, 1536).to(E4M3), device)  # too few tiles for few rows
