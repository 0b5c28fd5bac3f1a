"""The kernel of `attention_hopper` itself, without a GPU: see `emulate`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.kernels import attention_hopper, reference
from tests.serving.kernels.emulate import NEEDS_COMPILER, EmulatedKernel, Schedule, emulate
from tests.serving.kernels.packs import assert_as_exact_as, make_packed, poisoned, relative_error

pytestmark = NEEDS_COMPILER
LENGTHS = [1, 17, 64, 65, 128, 129, 200, 33, 300, 50]
HEADS, PRODUCERS, FIRST_PAIR, SECOND_PAIR = 4, 3, 0xFF0, 0xFF000  # the latter warps


@pytest.fixture(autouse=True)
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(attention_hopper, folder, monkeypatch)
    monkeypatch.setattr(attention_hopper, "starts_early", lambda _: False)


def attend(qkv: Tensor, lengths: list[int], factor: Tensor | None = None, is_upward: bool = False) -> Tensor:
    batch, ticket = make_packed(lengths, torch.device("cpu")), torch.zeros(1, dtype=torch.int32)
    width = qkv.shape[1] // 3
    out = poisoned(len(qkv), width, device=qkv.device)
    if factor is not None:
        out = out.to(torch.float8_e4m3fn)
    attention_hopper.attention(qkv, batch.tiles, HEADS, out, ticket, 2, factor, is_upward)
    assert int(ticket) == 0
    return out


@pytest.mark.parametrize(
    ("size", "schedule"),
    [
        (32, Schedule(0, PRODUCERS)),
        (32, Schedule(1, FIRST_PAIR)),
        (64, Schedule(2, SECOND_PAIR | 1)),
        (64, Schedule(1, 0xF0F0)),
    ],
)
def test_emulated_equals_plain_in_any_schedule(size: int, schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedKernel, "schedule", schedule)
    qkv, batch = (torch.randn(sum(LENGTHS), 3 * HEADS * size) * 1.5).half(), make_packed(LENGTHS, torch.device("cpu"))
    oracle = reference.attention(qkv.float(), batch.starts, batch.ends, HEADS)
    plain = reference.attention(qkv, batch.starts, batch.ends, HEADS)
    assert_as_exact_as(attend(qkv, LENGTHS, is_upward=schedule.seed == 1), plain, oracle)


@pytest.mark.parametrize("size", [32, 64])
def test_emulated_in_e4m3_is_the_result_times_the_factor(size: int) -> None:
    qkv, batch = (torch.randn(sum(LENGTHS), 3 * HEADS * size) * 1.5).half(), make_packed(LENGTHS, torch.device("cpu"))
    factor = torch.tensor([40.0])
    oracle = reference.attention(qkv.float(), batch.starts, batch.ends, HEADS)
    assert relative_error(attend(qkv, LENGTHS, factor).float() / factor, oracle) < 0.03


def test_emulated_rows_have_the_same_bits_in_any_place() -> None:
    qkv = (torch.randn(sum(LENGTHS), 3 * HEADS * 32) * 1.5).half()
    together, row = attend(qkv, LENGTHS), 0
    for length in LENGTHS:
        own = qkv[row : row + length].contiguous()
        assert torch.equal(attend(own, [length], is_upward=True), together[row : row + length])
        row += length
