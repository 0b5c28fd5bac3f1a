"""Attention over sequences cut into their own tiles, on a Hopper GPU: odd lengths, any number of programs."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from serving.engines.bert import Packed
from serving.kernels import reference
from serving.kernels.attention_hopper import HEAD_SIZES, attention
from serving.kernels.handover import starts_early
from tests.serving.kernels.packs import NEEDS_HOPPER, assert_as_exact_as, draw, make_packed, poisoned, relative_error

pytestmark = NEEDS_HOPPER
HEADS, PROGRAMS = 12, 132
ODD = [1, 2, 63, 64, 65, 127, 512, 300, 16, 1, 1, 50, 50, 129, 200, 3, 256, 255, 257, 31, 33, *[16] * 21, 400, 7, 90, 1]
BATCHES = [ODD, [1], [64], [65], [128], [129], [300, 2], [16] * 77 + [500], ODD * 9, [1] * 200]


@dataclass(frozen=True, slots=True)
class Case:
    """A batch with its queries, keys and values, and the ticket of every run on it."""

    batch: Packed
    qkv: Tensor
    ticket: Tensor

    def attend(self, programs: int = PROGRAMS, is_upward: bool = False) -> Tensor:
        out = poisoned(len(self.qkv), self.qkv.shape[1] // 3, device=self.qkv.device)
        attention(self.qkv, self.batch.tiles, HEADS, out, self.ticket, programs, None, is_upward)
        return out

    def refer(self, qkv: Tensor) -> Tensor:
        """The reference in the dtype of qkv."""
        return reference.attention(qkv, self.batch.starts, self.batch.ends, HEADS)


def make_case(lengths: list[int], size: int) -> Case:
    batch = make_packed(lengths, torch.device("cuda"))
    ticket = torch.zeros(1, dtype=torch.int32, device="cuda")
    return Case(batch, draw(len(batch.ids), 3 * HEADS * size, scale=1.5), ticket)


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("lengths", BATCHES)
def test_attention_equals_reference(lengths: list[int], size: int) -> None:
    """With any number of programs, in both directions; a ticket serves all runs, one after the other."""
    case = make_case(lengths, size)
    out = case.attend()
    assert_as_exact_as(out, case.refer(case.qkv), case.refer(case.qkv.float()))
    for programs, is_upward in ((1, True), (5, False), (PROGRAMS, True), (PROGRAMS, False)):
        assert torch.equal(case.attend(programs, is_upward), out)
    assert int(case.ticket) == 0


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("is_upward", [False, True])
def test_attention_in_e4m3_is_the_result_times_the_factor(size: int, is_upward: bool) -> None:
    case, factor = make_case(ODD, size), torch.tensor([40.0], device="cuda")
    out = poisoned(len(case.qkv), HEADS * size, device=case.qkv.device).to(torch.float8_e4m3fn)
    attention(case.qkv, case.batch.tiles, HEADS, out, case.ticket, PROGRAMS, factor, is_upward)
    assert relative_error(out.float() / factor, case.refer(case.qkv.float())) < 0.03
    assert int(case.ticket) == 0


def test_values_past_the_range_of_e4m3_are_cut_to_it() -> None:
    case, factor = make_case([70], 32), torch.tensor([1e30], device="cuda")
    out = torch.zeros(70, HEADS * 32, device="cuda").to(torch.float8_e4m3fn)
    attention(case.qkv, case.batch.tiles, HEADS, out, case.ticket, PROGRAMS, factor)
    assert set(out.float().unique().tolist()) == {-reference.E4M3_MAX, reference.E4M3_MAX}


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_a_result_has_the_bits_of_the_sequence_alone(size: int) -> None:
    case, row = make_case(ODD * 2, size), 0
    together = case.attend()
    for length in ODD * 2:
        alone = make_packed([length], torch.device("cuda"))
        own = Case(alone, case.qkv[row : row + length].contiguous(), case.ticket)
        assert torch.equal(own.attend(is_upward=True), together[row : row + length])
        row += length


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_rows_in_no_tile_are_left_as_they_are(size: int) -> None:
    """Keys there count for nobody."""
    case = make_case([130, 30], size)
    tiles = make_packed([130], torch.device("cuda")).tiles
    case.qkv[130:] = 30.0
    out = torch.full((160, HEADS * size), 7.0, dtype=torch.float16, device="cuda")
    attention(case.qkv, tiles, HEADS, out, case.ticket, PROGRAMS)
    none = torch.zeros(130, dtype=torch.int32, device="cuda")
    oracle = reference.attention(case.qkv[:130].float(), none, none + 130, HEADS)
    assert relative_error(out[:130], oracle) < 2e-3
    assert bool((out[130:] == 7.0).all())


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_runs_in_a_row_wait_for_each_other(size: int) -> None:
    """Each starts while the one before it ends, reads what that wrote and draws from its ticket: as if one by one."""
    rows, results = (2430, 810, 270, 90, 30), []
    batches = [make_packed([count // 2, 7, count - count // 2 - 7], torch.device("cuda")) for count in rows]
    case = make_case([rows[0]], size)
    assert starts_early(case.qkv)
    for waits in (True, False):
        outs = [poisoned(count, HEADS * size, device=case.qkv.device) for count in rows]
        torch.cuda.synchronize()
        qkv = case.qkv
        for batch, out in zip(batches, outs, strict=True):
            attention(qkv, batch.tiles, HEADS, out, case.ticket, PROGRAMS)
            qkv = out.view(-1, 3 * HEADS * size)
            if waits:
                torch.cuda.synchronize()
        results.append(outs)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert bool(torch.isfinite(results[0][-1].float()).all())
    assert int(case.ticket) == 0
