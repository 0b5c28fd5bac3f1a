"""The feed-forward block's kernel itself, without a GPU: see `emulate`."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.kernels import feed_forward
from serving.kernels.feed_forward import Block
from tests.serving.kernels.emulate import NEEDS_COMPILER, EmulatedKernel, Schedule, emulate
from tests.serving.kernels.packs import activate, narrow, relative_error, sum_rows

HIDDEN, INNER, EPS = 384, 1536, 1e-12
ROWS = 310  # three tiles, of which the last has none for its second group
E4M3 = torch.float8_e4m3fn
PRODUCER, ATTENDING, FIRST_GROUP, SECOND_GROUP = 1, 2 | 4, 0xF0, 0xF00  # warps


@dataclass(frozen=True, slots=True)
class Case:
    """Rows and one block: `x` float16 before its norm, `narrow` its copy; the weights as they are."""

    x: Tensor
    narrow: Tensor
    sums: Tensor
    up: Tensor
    down: Tensor
    block: Block
    out_factor: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """Of the rows of a case."""

    x: Tensor
    narrow: Tensor
    sums: Tensor


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    x = torch.randn(ROWS, HIDDEN).half()
    up, down = torch.randn(INNER, HIDDEN).mul(8).to(E4M3), torch.randn(HIDDEN, INNER).mul(8).to(E4M3)
    up_bias, down_bias, scale = (torch.randn(size).half() for size in (INNER, HIDDEN, HIDDEN))
    scales = [torch.tensor([each]) for each in (1 / 16, 0.05 / 8, 1 / 32, 0.05 / 8, 32.0)]
    block = Block(feed_forward.arrange(up, down), up_bias, down_bias, scale, *scales)
    return Case(x, x.mul(16).to(E4M3), sum_rows(x), up, down, block, torch.tensor([24.0]))


def compute(case: Case) -> Result:
    """The same in plain PyTorch, in float32 between the roundings of the kernel."""
    block, x = case.block, case.x.float()
    mean = case.sums[..., 0].sum(1, keepdim=True) / HIDDEN
    spread = (case.sums[..., 1].sum(1, keepdim=True) / HIDDEN - mean.square() + EPS).rsqrt()
    half = case.narrow.float() @ case.up.float().T * (spread * block.x_scale * block.up_scale) + block.up_bias.float()
    inner = narrow(activate((half / 2).half()), block.inner_factor)
    product = inner @ case.down.float().T
    added = (x - mean) * spread * block.scale.float() + block.down_bias.float()
    out = product * (block.inner_scale * block.down_scale) + added
    copied = narrow(out.half(), case.out_factor)
    copied = copied.unflatten(1, (-1, 2, 4, 2)).transpose(2, 3).flatten(1)  # the order of `reorder`
    return Result(out.half(), copied.to(E4M3), sum_rows(out))


def run(case: Case, rows: slice, copies: bool, pairs: int = 1, is_upward: bool = False) -> Result:
    x, narrow, sums = case.x[rows].clone(), case.narrow[rows].clone(), case.sums[rows].contiguous()
    out_sums, factor = torch.full((len(x) + 128, 2, 2), float("nan")), case.out_factor if copies else None
    feed_forward.run(x, narrow, sums, case.block, out_sums, 2 * pairs, EPS, is_upward, factor)
    assert bool(out_sums[len(x) :].isnan().all())
    return Result(x, narrow, out_sums[: len(x)])


@pytest.fixture
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(feed_forward, folder, monkeypatch)


def test_arranged_weights_are_what_each_stage_is_read_as(case: Case) -> None:
    stages = case.block.weights.view(2, 12, 4, -1)
    row, column = torch.arange(192)[:, None], torch.arange(64)  # of rows of 64 bytes
    place = row * 64 + (column // 16 ^ row // 2 % 4) * 16 + column % 16
    own = column // 16 * 16 + column % 16 // 4 * 2 + column % 4 // 2 * 8 + column % 2  # as products leave them
    sent = column % 16 // 4 * 16 + column // 16 * 2 + column % 4 // 2 * 8 + column % 2  # thread by thread
    up, down = case.up.view(torch.uint8), case.down.view(torch.uint8)
    for rank in range(2):
        for chunk in range(12):
            for half in range(2):
                weights = up[rank * 768 + chunk * 64 + row % 64, half * 192 + row // 64 * 64 + column]
                assert torch.equal(stages[rank, chunk, half][place], weights)
            for other, order in enumerate((own, sent)):
                weights = down[rank * 192 + row, (rank ^ other) * 768 + chunk * 64 + order]
                assert torch.equal(stages[rank, chunk, 2 + other][place], weights)


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("copies", "schedule"),
    [
        (True, Schedule(0, ATTENDING)),
        (True, Schedule(1, SECOND_GROUP, 2)),
        (False, Schedule(2, FIRST_GROUP | PRODUCER, 1)),
    ],
)
def test_emulated_equals_plain_in_any_schedule(
    copies: bool, schedule: Schedule, case: Case, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedKernel, "schedule", schedule)
    plain, result = compute(case), run(case, slice(None), copies, is_upward=schedule.seed == 1)
    assert relative_error(result.x, plain.x) < 1e-4
    assert relative_error(result.sums, plain.sums) < 1e-4
    assert relative_error(result.narrow.float(), (plain if copies else case).narrow.float()) < 1e-3


@NEEDS_COMPILER
def test_emulated_rows_have_the_same_bits_in_any_place(case: Case, emulated: None) -> None:
    whole = run(case, slice(None), True, is_upward=True)
    for rows, copies in ((slice(ROWS - 1, ROWS), True), (slice(64, 129), False)):
        part = run(case, rows, copies, pairs=2)
        assert torch.equal(part.x, whole.x[rows])
        assert torch.equal(part.sums, whole.sums[rows])
        assert torch.equal(part.narrow.float(), (whole if copies else case).narrow[rows].float())
