"""Which kernel takes what, as the host decides it: the same on any machine."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from serving import kernels
from serving.kernels import attention, feed_forward, gemm_wide, handover, reference
from tests.serving.kernels.packs import make_packed, poisoned, relative_error

HALF, E4M3 = torch.float16, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("columns", "depth", "dtype", "fits"),
    [
        (2304, 768, HALF, True),
        (384, 1536, HALF, True),
        (1536, 512, HALF, True),
        (1536, 384, HALF, False),  # the other GEMM keeps such weights in shared memory
        (1024, 1024, HALF, False),  # no whole tiles
        (2304, 800, HALF, False),  # no whole steps of the ring
        (2304, 768, torch.float32, False),
        (768, 768, E4M3, True),
        (576, 768, E4M3, False),  # too few tiles for few rows
        (2304, 576, E4M3, False),
    ],
)
def test_the_wide_gemm_fits_whole_tiles_of_long_rows(
    columns: int, depth: int, dtype: torch.dtype, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.empty(columns, depth, dtype=dtype)
    assert not gemm_wide.fits(weight, weight.device)  # this is no Hopper GPU
    monkeypatch.setattr(gemm_wide, "is_hopper", lambda device: True)
    assert gemm_wide.fits(weight, weight.device) == fits


@pytest.mark.parametrize(
    ("up", "down", "hidden", "fits"),
    [(E4M3, E4M3, 384, True), (HALF, HALF, 384, False), (E4M3, HALF, 384, False), (E4M3, E4M3, 768, False)],
)
def test_the_feed_forward_block_fits_minilm_in_e4m3(
    up: torch.dtype, down: torch.dtype, hidden: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.empty(4 * hidden, hidden, dtype=up), torch.empty(hidden, 4 * hidden, dtype=down)
    assert not feed_forward.fits(*weights, torch.device("cpu"))  # this is no Hopper GPU
    monkeypatch.setattr(feed_forward, "is_hopper", lambda device: True)
    assert feed_forward.fits(*weights, torch.device("cpu")) == fits


def test_rows_are_enough_for_the_wide_gemm_once_the_other_ones_tiles_are_more_than_the_processors() -> None:
    for columns, programs in ((384, 132), (768, 132), (768, 114), (1152, 78)):
        least = gemm_wide.least_rows(columns, programs)
        tiles = [rows / 128 * columns / 128 for rows in (least - 1, least)]
        assert tiles[0] <= programs < tiles[1]


@pytest.mark.parametrize(
    ("tiles", "programs", "cut"),
    [(800, 132, 8), (132, 132, 0), (264 + 66, 132, 66), (264 + 68, 132, 0), (1, 132, 1), (67, 132, 0), (5, 1, 0)],
)
def test_the_tiles_of_the_last_round_are_cut_where_their_halves_are_no_more_than_the_programs(
    tiles: int, programs: int, cut: int
) -> None:
    assert gemm_wide.count_cut(tiles, programs) == cut


@pytest.mark.parametrize("across", [1, 2, 4, 6, 8, 12, 16])
def test_a_program_that_keeps_its_column_keeps_it_in_a_half(across: int) -> None:
    """Its number is further by whole rows of tiles in each turn, and by the cut tiles in a second half."""
    programs = 132 - 132 % across
    assert all(gemm_wide.count_cut(down * across, programs) % across == 0 for down in range(1, 500))


@pytest.mark.parametrize(
    ("rows", "is_hopper", "starts_early"),
    [(8192, True, True), (8193, True, False), (1, False, False)],
)
def test_kernels_start_early_on_few_rows_of_hopper(
    rows: int, is_hopper: bool, starts_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "is_hopper", lambda device: is_hopper)
    assert handover.starts_early(torch.empty(rows, 1)) == starts_early


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize(
    ("processors", "heads", "is_steady", "many", "shares"),
    [
        (132, 2, True, 2048, True),
        (132, 2, False, 20, True),
        (132, 2, False, 2048, False),  # too few rows
        (132, 4, True, 20, False),  # heads of 32
        (0, 2, True, 20, False),  # no Hopper GPU
    ],
)
def test_heads_of_64_share_their_keys_on_hopper_where_rows_are_many_or_bits_steady(
    processors: int, heads: int, is_steady: bool, many: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(qkv: Tensor, starts: Tensor, ends: Tensor, heads: int, out: Tensor, *others: object) -> None:
        calls.append(others)
        out.copy_(reference.attention(qkv, starts, ends, heads))

    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(kernels, "attention_hopper", SimpleNamespace(attention=share), raising=False)
    monkeypatch.setattr(attention, "count_hopper_processors", lambda device: processors)
    monkeypatch.setattr(attention, "MANY_ROWS", many)
    batch = make_packed([5, 1, 14], torch.device("cpu"))
    qkv, out = torch.randn(20, 3 * 128).half(), poisoned(20, 128, device=torch.device("cpu"))
    attention.attention(qkv, batch.starts, batch.ends, heads, out, is_steady=is_steady, is_upward=False)
    assert relative_error(out, reference.attention(qkv.float(), batch.starts, batch.ends, heads)) < 2e-3
    assert calls == ([(processors, None, is_steady, False, False)] if shares else [])
