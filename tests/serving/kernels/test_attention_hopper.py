"""Attention whose tiles share their keys against its twin, on a Hopper GPU: odd lengths, any number of programs."""

import pytest
import torch
from torch import Tensor

from serving.kernels import reference
from tests.serving.kernels.packs import NEEDS_HOPPER, assert_as_exact_as, make_packed, poisoned, relative_error

pytestmark = NEEDS_HOPPER
HEADS, SIZE = 12, 64
ODD = [1, 2, 63, 64, 65, 127, 512, 300, 16, 1, 1, 50, 50, 129, 200, 3, 256, 255, 257, 31, 33, *[16] * 21, 400, 7, 90, 1]
BATCHES = [ODD, [1], [64], [65], [300, 2], [16] * 77 + [500], ODD * 9, [1] * 200]


def draw(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a batch, and where each row's sequence begins and ends."""
    batch = make_packed(lengths, torch.device("cuda"))
    qkv = torch.randn(len(batch.ids), 3 * HEADS * SIZE, device="cuda") * 1.5
    return qkv.half(), batch.starts, batch.ends


def attend(
    qkv: Tensor, starts: Tensor, ends: Tensor, is_steady: bool = False, programs: int = 132, is_upward: bool = True
) -> Tensor:
    from serving.kernels.attention_hopper import attention

    out = poisoned(len(qkv), HEADS * SIZE, device=qkv.device)
    attention(qkv, starts, ends, HEADS, out, programs, None, is_steady, is_upward)
    return out


@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("is_steady", [False, True])
def test_attention_equals_reference(lengths: list[int], is_steady: bool) -> None:
    qkv, starts, ends = draw(lengths)
    oracle = reference.attention(qkv.float(), starts, ends, HEADS)
    plain = reference.attention(qkv, starts, ends, HEADS)
    out = attend(qkv, starts, ends, is_steady)
    assert_as_exact_as(out, plain, oracle)
    for programs, is_upward in ((1, True), (5, False)):
        assert torch.equal(attend(qkv, starts, ends, is_steady, programs, is_upward), out)


def test_attention_in_e4m3_is_the_result_times_the_factor() -> None:
    from serving.kernels.attention_hopper import attention

    qkv, starts, ends = draw(ODD)
    factor, out = torch.tensor([40.0], device="cuda"), torch.zeros(len(qkv), HEADS * SIZE, device="cuda")
    narrow = out.to(torch.float8_e4m3fn)
    attention(qkv, starts, ends, HEADS, narrow, 132, factor, is_steady=True)
    oracle = reference.attention(qkv.float(), starts, ends, HEADS)
    assert relative_error(narrow.float() / factor, oracle) < 0.03


def test_a_steady_result_has_the_bits_of_the_sequence_alone() -> None:
    qkv, starts, ends = draw(ODD * 2)
    together, row = attend(qkv, starts, ends, is_steady=True), 0
    for length in ODD:
        own = qkv[row : row + length].contiguous()
        none = torch.zeros(length, dtype=torch.int32, device="cuda")
        assert torch.equal(attend(own, none, none + length, is_steady=True), together[row : row + length])
        row += length
