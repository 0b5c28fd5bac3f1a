"""Padded batches to packed ones: which rows share a run, and the one array of integers a run needs. Pure numpy."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.tokenizer import Ids

Lengths = NDArray[np.int64]
Int32 = NDArray[np.int32]
TILE = 128  # rows of a sequence that attention takes at a time
FILLER = 16  # tokens of a sequence that only fills a run up; a model has at least as many positions


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model takes: ids below `vocabulary`, texts up to `positions` tokens."""

    vocabulary: int
    positions: int


def check_batch(input_ids: Ids, attention_mask: Ids, limits: Limits) -> Lengths:
    """The number of tokens of each row [B]. Raises ValueError for what a kernel must never see.

    That is an empty row or batch, an id outside the vocabulary, a row longer than the table of positions, or a mask
    that is not ones and then zeros.
    """
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape or not len(input_ids):
        raise ValueError(f"ids {input_ids.shape} and mask {attention_mask.shape} must both be [B, T] with B at least 1")
    lengths: Lengths = attention_mask.sum(axis=1)
    if (attention_mask != (np.arange(input_ids.shape[1]) < lengths[:, None])).any():
        raise ValueError("a row of the mask is not ones followed by zeros")
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1:
        raise ValueError(f"row {int(lengths.argmin())} has no tokens")
    if longest > limits.positions:
        raise ValueError(f"a text of {longest} tokens, the model has {limits.positions} positions")
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= limits.vocabulary:
        raise ValueError(f"ids {lowest} to {highest}, the model knows 0 to {limits.vocabulary - 1}")
    return lengths


def split_rows(lengths: Lengths, max_tokens: int, max_rows: int) -> Iterator[slice]:
    """Consecutive rows in runs of at most `max_tokens` tokens, a longer row by itself, and of `max_rows` rows."""
    first = tokens = 0
    for row, length in enumerate(lengths.tolist()):
        if row > first and (tokens + length > max_tokens or row - first == max_rows):
            yield slice(first, row)
            first, tokens = row, 0
        tokens += length
    yield slice(first, len(lengths))


def packed_size(tokens: int, rows: int) -> int:
    """Integers that `pack` writes for a run of so many tokens and rows."""
    return 3 * tokens + rows + 1 + 2 + 3 * (tokens // FILLER + rows + 1)


def list_tiles(bounds: Lengths, into: Int32) -> None:
    """Cut sequences at `bounds` [S + 1] into tiles of TILE rows, the last of each with what is left.

    Into the beginning of `into`: how many tiles there are, how many of them, the first, are of sequences that have
    several, and of each its first row and where its sequence begins and ends. Those are the ones that take longest:
    begun first, they are not what all wait for in the end.
    """
    first, end = bounds[:-1], bounds[1:]
    counts = (end - first + (TILE - 1)) // TILE
    total = into[0] = int(counts.sum())
    tiles = into[2 : 3 * total + 2].reshape(total, 3)
    is_one = counts == 1
    if is_one.all():  # as of a lone text, which is not to wait
        into[1], tiles[:, 0], tiles[:, 1], tiles[:, 2] = 0, first, first, end
        return
    into[1], order = total - int(is_one.sum()), is_one.argsort(kind="stable")
    first, end, counts = first[order], end[order], counts[order]
    tiles[:, 1], tiles[:, 2] = first.repeat(counts), end.repeat(counts)
    tiles[:, 0] = tiles[:, 1] + TILE * (np.arange(total) - (counts.cumsum() - counts).repeat(counts))


def pack(input_ids: Ids, lengths: Lengths, tokens: int, rows: int, into: Int32) -> None:
    """Write ids, sequence starts and sequence ends [tokens], offsets [rows + 1] and what `list_tiles` says into `into`,
    one after the other.

    `tokens` and `rows` may exceed the batch's: what is left over becomes sequences of up to FILLER tokens 0, and empty
    rows.
    """
    count, real = len(lengths), int(lengths.sum())
    ids, starts, ends = into[: 3 * tokens].reshape(3, tokens)
    offsets, tiles = into[3 * tokens : 3 * tokens + rows + 1], into[3 * tokens + rows + 1 :]
    bounds = np.empty(count + 1 + -(-(tokens - real) // FILLER), dtype=np.int64)
    bounds[0] = 0
    lengths.cumsum(out=bounds[1 : count + 1])
    bounds[count + 1 :] = range(real + FILLER, tokens + FILLER, FILLER)
    bounds[-1] = tokens
    ids[:real] = input_ids[np.arange(input_ids.shape[1]) < lengths[:, None]]
    ids[real:] = 0
    counts = bounds[1:] - bounds[:-1]
    starts[:] = bounds[:-1].repeat(counts)
    ends[:] = bounds[1:].repeat(counts)
    offsets[: count + 1] = bounds[: count + 1]
    offsets[count + 1 :] = real
    list_tiles(bounds, tiles)
