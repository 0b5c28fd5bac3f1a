"""The GEMM with tiles of 192 columns against plain PyTorch, on a Hopper GPU: tiles not full, several a program."""

import pytest
import torch
from torch.nn.functional import layer_norm

from serving.kernels import gemm_wide, reference
from serving.kernels.handover import starts_early
from tests.serving.kernels.packs import HALVED_ROWS, NEEDS_HOPPER, assert_as_exact_as, draw, poisoned, sum_rows

pytestmark = NEEDS_HOPPER
PROGRAMS, EPS = 132, 1e-12
ROWS = [1, 127, 2049, 40_001]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("columns", "depth", "part"), [(1152, 384, 128), (2304, 768, 192), (3072, 768, 768)])
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_normalises_its_input(rows: int, columns: int, depth: int, part: int, gelu: bool) -> None:
    x, weight, bias = draw(rows, depth) + 0.3, draw(columns, depth, scale=depth**-0.5), draw(columns)
    scale, shift = draw(depth), draw(depth)
    scaled = weight.float() * scale.float()
    centred = (scaled - scaled.mean(1, keepdim=True)).half()
    folded_bias = (bias.float() + weight.float() @ shift.float()).half()
    out = poisoned(rows, columns, device=x.device)
    gemm_wide.linear(x, centred, folded_bias, out, PROGRAMS, sum_rows(x, part), EPS, gelu)
    normed = layer_norm(x.float(), [depth], scale.float(), shift.float(), EPS)
    oracle = reference.linear(normed, weight.float(), bias.float(), gelu)
    assert_as_exact_as(out, reference.linear(normed.half(), weight, bias, gelu), oracle)
    upward = poisoned(rows, columns, device=x.device)
    gemm_wide.linear(x, centred, folded_bias, upward, PROGRAMS, sum_rows(x, part), EPS, gelu, is_upward=True)
    assert torch.equal(upward, out)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("columns", "depth", "part"), [(384, 1536, 128), (768, 768, 192), (768, 3072, 192)])
def test_add_normalises_the_residual_and_sums_what_it_writes(rows: int, columns: int, depth: int, part: int) -> None:
    x, weight, bias = draw(rows, depth), draw(columns, depth, scale=depth**-0.5), draw(columns)
    total, scale = draw(rows, columns) * 3 - 0.5, draw(columns)
    normed = layer_norm(total.float(), [columns], scale.float(), None, EPS)
    oracle = x.float() @ weight.float().T + bias.float() + normed
    plain = x @ weight.T + bias + normed.half()
    out_sums = poisoned(rows, columns // gemm_wide.COLUMNS, 2, device=x.device, dtype=torch.float32)
    gemm_wide.add(x, weight, bias, total, PROGRAMS, sum_rows(total, part), scale, EPS, out_sums)
    assert_as_exact_as(total, plain, oracle)
    torch.testing.assert_close(out_sums, sum_rows(oracle), rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("is_upward", [False, True])
@pytest.mark.parametrize("rows", HALVED_ROWS)
def test_halves_have_the_bits_of_whole_tiles(rows: int, is_upward: bool) -> None:
    """Whole tiles: with rows that fill them, in full rounds of one row of tiles."""
    filled = -(-rows // 128) * 128
    x, total, scale, results = draw(filled, 768), draw(filled, 768), draw(768), []
    up, down, bias, sums = draw(3072, 768, scale=0.03), draw(768, 768, scale=0.03), draw(3072), sum_rows(x)
    before = sum_rows(total)
    for size, programs in ((filled, (16, 4)), (rows, (PROGRAMS, PROGRAMS))):
        out, added = poisoned(size, 3072, device=x.device), total[:size].clone()
        after = poisoned(size, 4, 2, device=x.device, dtype=torch.float32)
        gemm_wide.linear(x[:size], up, bias, out, programs[0], sums[:size], EPS, True, is_upward)
        gemm_wide.add(
            x[:size], down, bias[:768], added, programs[1], before[:size], scale, EPS, after, is_upward
        )  # fmt: skip
        results.append((out[:rows], added[:rows], after[:rows]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [4353, 8000])  # a last round of halves, and one of whole tiles
def test_kernels_in_a_row_wait_for_each_other(rows: int) -> None:
    """Each starts while the one before it ends: a chain of sums is the same as one by one."""
    x, weight, bias, scale = draw(rows, 768), draw(768, 768, scale=0.03), draw(768), draw(768)
    start, results = draw(rows, 768), []
    assert starts_early(x)
    for waits in (True, False):
        total, sums = start.clone(), sum_rows(start)
        after = torch.empty_like(sums)
        for _ in range(20):
            gemm_wide.add(x, weight, bias, total, PROGRAMS, sums, scale, EPS, after)
            sums, after = after, sums
            if waits:
                torch.cuda.synchronize()
        results.append(total)
    assert torch.equal(*results)
    assert bool(torch.isfinite(results[0].float()).all())


def test_what_does_not_fit_goes_elsewhere() -> None:
    device = torch.device("cuda")
    assert gemm_wide.fits(draw(2304, 768), device)
    assert not gemm_wide.fits(draw(384, 384), device)  # the other one keeps such weights in shared memory
    assert not gemm_wide.fits(draw(1024, 1024), device)
    assert not gemm_wide.fits(draw(2304, 768).float(), device)
