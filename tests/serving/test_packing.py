"""Padded batches become packed ones without losing or mixing a token."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engines.packing import FILLER, TILE, Limits, check_batch, list_tiles, pack, packed_size, split_rows
from serving.tokenizer import Ids, pad_batch

LIMITS = Limits(vocabulary=100, positions=32)
LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=20)
LONG = st.lists(st.integers(1, 600), min_size=1, max_size=20)


def make_rows(lengths: list[int]) -> list[Ids]:
    return [np.arange(length, dtype=np.int64) + row for row, length in enumerate(lengths)]


@given(st.one_of(LENGTHS, LONG), st.integers(0, 40), st.integers(0, 3))
def test_pack_keeps_every_sequence_and_fills_the_rest(lengths: list[int], spare: int, empty: int) -> None:
    rows = make_rows(lengths)
    real, tokens, count = sum(lengths), sum(lengths) + spare, len(lengths) + empty
    numbers = np.full(packed_size(tokens, count), -1, dtype=np.int32)
    pack(pad_batch(rows)[0], np.array(lengths), tokens, count, numbers)
    ids, starts, ends = numbers[: 3 * tokens].reshape(3, tokens)
    offsets, tiles = numbers[3 * tokens :][: count + 1], numbers[3 * tokens :][count + 1 :]
    for row, (begin, end) in enumerate(pairwise(offsets[: len(rows) + 1])):
        assert ids[begin:end].tolist() == rows[row].tolist()
        assert set(starts[begin:end]) == {begin}
        assert set(ends[begin:end]) == {end}
    assert (offsets[len(rows) :] == real).all()
    assert (ends[real:] - starts[real:] <= FILLER).all()
    assert ((starts[real:] <= np.arange(real, tokens)) & (np.arange(real, tokens) < ends[real:])).all()
    assert (np.diff(starts) >= 0).all()
    top, first, end = tiles[2 : 3 * tiles[0] + 2].reshape(-1, 3).T
    assert ((end - first > TILE) == (np.arange(tiles[0]) < tiles[1])).all()
    assert np.array_equal(first, starts[top])
    assert np.array_equal(end, ends[top])
    assert ((top - first) % TILE == 0).all()
    covered = [row for begin, until in zip(top, end, strict=True) for row in range(begin, min(begin + TILE, until))]
    assert sorted(covered) == list(range(tokens))


def test_list_tiles_cuts_each_sequence_from_its_beginning_and_has_those_of_several_first() -> None:
    tiles = np.full(25, -1, dtype=np.int32)
    list_tiles(np.array([0, 1, 258, 386, 515]), tiles)
    assert tiles[:2].tolist() == [7, 5]
    assert tiles[2:23].reshape(7, 3).tolist() == [
        [1, 1, 258], [129, 1, 258], [257, 1, 258], [386, 386, 515], [514, 386, 515], [0, 0, 1], [258, 258, 386],
    ]  # fmt: skip
    assert (tiles[23:] == -1).all()


@given(LENGTHS, st.integers(32, 80), st.integers(1, 6))
def test_split_rows_covers_all_within_both_limits(lengths: list[int], max_tokens: int, max_rows: int) -> None:
    runs = list(split_rows(np.array(lengths), max_tokens, max_rows))
    assert [row for run in runs for row in range(run.start, run.stop)] == list(range(len(lengths)))
    for run in runs:
        assert 1 <= run.stop - run.start <= max_rows
        assert sum(lengths[run]) <= max_tokens


def test_check_batch_counts_the_tokens_of_each_row() -> None:
    assert check_batch(*pad_batch(make_rows([3, 1, 32])), LIMITS).tolist() == [3, 1, 32]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((0, 4)), np.zeros((0, 4)), "B at least 1"),
        (np.zeros((1, 4)), np.ones((1, 3)), "must both be"),
        (np.zeros((2, 2)), np.array([[1, 1], [0, 0]]), "row 1 has no tokens"),
        (np.zeros((1, 3)), np.array([[0, 1, 1]]), "ones followed by zeros"),
        (np.zeros((1, 33)), np.ones((1, 33)), "33 tokens, the model has 32 positions"),
        (np.array([[100]]), np.ones((1, 1)), "the model knows 0 to 99"),
        (np.array([[-1]]), np.ones((1, 1)), "ids -1 to -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_batch_refuses_what_no_kernel_may_see(ids: Ids, mask: Ids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(ids.astype(np.int64), mask.astype(np.int64), LIMITS)
