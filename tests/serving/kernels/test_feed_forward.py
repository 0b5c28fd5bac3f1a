"""The feed-forward block in one kernel against plain PyTorch, on a Hopper GPU: tiles not full, several a program."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from serving.kernels import feed_forward, reference
from serving.kernels.handover import starts_early
from tests.serving.kernels.packs import NEEDS_HOPPER, draw, in_order, poisoned, quantize, relative_error, sum_rows

pytestmark = NEEDS_HOPPER
HIDDEN, INNER, PROGRAMS, EPS = 384, 1536, 132, 1e-12
ROWS = [1, 64, 65, 129, 8_449, 25_345]  # the last of four rounds, where one group has one row and the other none


@dataclass
class Case:
    """Rows, their copy in E4M3, a block, and what plain PyTorch makes of them."""

    x: Tensor
    narrow: Tensor
    block: feed_forward.Block
    oracle: Tensor

    def run(self, upward: bool = False, factor: Tensor | None = None, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """The result, its sums, and the copy."""
        x, narrow = self.x[rows].clone(), self.narrow[rows].clone()
        out_sums = poisoned(len(x), 2, 2, device=x.device, dtype=torch.float32)
        sums = sum_rows(self.x, 128)[rows].contiguous()
        feed_forward.run(x, narrow, sums, self.block, out_sums, PROGRAMS, EPS, upward, factor)
        return x, out_sums, narrow


def make_case(rows: int) -> Case:
    x, scale, up_bias, down_bias = draw(rows, HIDDEN) + 0.1, draw(HIDDEN, scale=0.3) + 1, draw(INNER), draw(HIDDEN)
    up, down = draw(INNER, HIDDEN, scale=HIDDEN**-0.5).float(), draw(HIDDEN, INNER, scale=INNER**-0.5)
    (narrow, x_scale), (up, up_scale), (down, down_scale) = map(quantize, (x, up - up.mean(1, keepdim=True), down))
    mean, spread = x.float().mean(1, keepdim=True), torch.rsqrt(x.float().var(1, correction=0, keepdim=True) + EPS)
    inner = (narrow.float() * x_scale) @ (up.float() * up_scale).T * spread + up_bias.float()
    inner, inner_scale = quantize(torch.nn.functional.gelu(inner))
    added = (x.float() - mean) * spread * scale.float() + down_bias.float()
    oracle = (inner.float() * inner_scale) @ (down.float() * down_scale).T + added
    scales = x_scale, up_scale, inner_scale, down_scale, 1 / inner_scale
    block = feed_forward.Block(feed_forward.arrange(up, down), up_bias, down_bias, scale, *scales)
    return Case(x, narrow, block, oracle)


@pytest.mark.parametrize("rows", ROWS)
def test_it_adds_to_its_normalised_input_and_sums_what_it_writes(rows: int) -> None:
    case = make_case(rows)
    out, sums, narrow = case.run()
    assert relative_error(out, case.oracle) < 6e-3  # an intermediate on the edge of two values of E4M3
    torch.testing.assert_close(sums, sum_rows(out), rtol=1e-2, atol=0.5)
    assert torch.equal(narrow.view(torch.uint8), case.narrow.view(torch.uint8))
    factor, most = torch.tensor([20.0], device=out.device), reference.E4M3_MAX / 20
    for upward in (False, True):
        again, again_sums, copy = case.run(upward, factor)
        assert torch.equal(again, out)
        assert torch.equal(again_sums, sums)
        assert relative_error(in_order(copy, 16) / factor, case.oracle.clamp(-most, most)) < 0.04


def test_a_row_has_the_same_bits_in_any_company() -> None:
    case = make_case(25_345)
    out, sums, _ = case.run()
    for rows in (slice(0, 1), slice(16_900, 17_000), slice(25_280, 25_345)):
        part, part_sums, _ = case.run(rows=rows)
        assert torch.equal(part, out[rows])
        assert torch.equal(part_sums, sums[rows])


def test_kernels_in_a_row_wait_for_each_other() -> None:
    """Each starts while the one before it ends: a chain of blocks is the same as one by one."""
    case, results = make_case(4_353), []
    assert starts_early(case.x)
    factor = torch.tensor([20.0], device=case.x.device)
    for waits in (True, False):
        x, narrow, sums = case.x.clone(), case.narrow.clone(), sum_rows(case.x)
        after = torch.empty_like(sums)
        for _ in range(20):
            feed_forward.run(x, narrow, sums, case.block, after, PROGRAMS, EPS, False, factor)
            sums, after = after, sums
            if waits:
                torch.cuda.synchronize()
        results.append(x)
    assert torch.equal(*results)
    assert bool(torch.isfinite(results[0].float()).all())
