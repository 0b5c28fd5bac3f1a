"""The ping-pong GEMM against its twin, on a Hopper GPU: several tiles a program, and a last tile that is not full."""

import pytest
import torch

from serving.kernels import reference
from tests.serving.kernels.packs import assert_as_exact_as, poisoned, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs capability 9.x"
    ),
]
SHAPES = [(2049, 1536, 384), (6001, 384, 1536), (2560, 1152, 384)]
PROGRAMS = 132


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).half()


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_equals_reference(rows: int, columns: int, depth: int, gelu: bool) -> None:
    from serving.kernels.gemm_hopper import linear

    x, weight, bias = draw(rows, depth), draw(columns, depth, scale=depth**-0.5), draw(columns)
    out = poisoned(rows, columns, device=x.device)
    linear(x, weight, bias, out, PROGRAMS, gelu)
    oracle = reference.linear(x.float(), weight.float(), bias.float(), gelu)
    assert_as_exact_as(out, reference.linear(x, weight, bias, gelu), oracle)


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
