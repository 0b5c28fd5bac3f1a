"""Which kernel takes what, as the host decides it: the same on any machine."""

import pytest
import torch

from serving.kernels import HEAD_SIZES, attention, attention_hopper, feed_forward, gemm_wide, handover

HALF, E4M3 = torch.float16, torch.float8_e4m3fn


def test_attention_takes_the_head_sizes_that_models_are_held_to() -> None:
    assert attention._LIMITS.keys() == {(size, is_steady) for size in HEAD_SIZES for is_steady in (False, True)}
    assert set(attention_hopper.HEAD_SIZES) <= set(HEAD_SIZES)


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


@pytest.mark.parametrize(
    ("hidden", "heads", "fits"),
    [(384, 12, True), (768, 12, True), (128, 2, True), (320, 5, False), (192, 12, False), (1024, 8, False)],
)
def test_attention_for_hopper_fits_pairs_of_heads_of_32_and_64(
    hidden: int, heads: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert not attention_hopper.fits(hidden, heads, cpu)  # this is no Hopper GPU
    monkeypatch.setattr(attention_hopper, "is_hopper", lambda device: True)
    assert attention_hopper.fits(hidden, heads, cpu) == fits


@pytest.mark.parametrize(
    ("depth", "adds", "gives", "is_deep"),
    [(768, True, True, False), (1536, True, True, True), (3072, True, False, False), (3072, False, True, False)],
)
def test_the_wide_gemm_writes_copies_by_threads_for_deep_products(
    depth: int, adds: bool, gives: bool, is_deep: bool
) -> None:
    weight = torch.empty(192, depth, dtype=E4M3)
    assert gemm_wide.Form.of(weight, adds, False, gives) == (adds, False, True, gives, is_deep)


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
    [(32_768, True, True), (32_769, True, False), (1, False, False)],
)
def test_kernels_start_early_on_few_rows_of_hopper(
    rows: int, is_hopper: bool, starts_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "is_hopper", lambda device: is_hopper)
    assert handover.starts_early(torch.empty(rows, 1)) == starts_early
