from hypothesis import given
from hypothesis import strategies as st

from serving.shapes import EXACT, ShapeGrid

GRID = ShapeGrid(max_length=250, is_coarse=True)


@given(st.integers(1, 250))
def test_length_is_rounded_up_by_a_quarter_or_three_at_most_and_within_the_limit(length: int) -> None:
    rounded = GRID.round_length(length)
    assert length <= rounded <= min(250, max(length + 3, 1.25 * length))
    assert GRID.round_length(rounded) == rounded
    assert EXACT.round_length(length) == length


@given(st.integers(1, 4096))
def test_size_is_rounded_down_by_less_than_a_quarter(size: int) -> None:
    rounded = GRID.round_size(size)
    assert 0.75 * size < rounded <= size
    assert GRID.round_size(rounded) == rounded
    assert EXACT.round_size(size) == size


def test_coarse_grid_has_few_shapes() -> None:
    assert len({GRID.round_length(length) for length in range(1, 251)}) <= 25
    assert len({GRID.round_size(size) for size in range(1, 65)}) <= 25


def test_small_shapes_are_exact_in_size_and_multiples_of_four_in_length() -> None:
    assert [GRID.round_size(size) for size in (1, 7, 8, 9, 15, 17, 33, 64)] == [1, 7, 8, 8, 14, 16, 32, 64]
    assert [GRID.round_length(length) for length in (3, 9, 16, 17, 33, 65, 249)] == [4, 12, 16, 20, 40, 80, 250]
