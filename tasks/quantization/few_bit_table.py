"""The embedding table in 2 or 3 bits: more than half of a small model's numbers, and the cheapest to squeeze."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.tokenizer import Ids
from tasks.quantization.packed import FewBitTable, Rows
from tasks.quantization.trellis import LIMIT, Floats, States, choose_states, codebook

_CHUNK = 128  # rows at a time: what they need stays in the cache
_OFTEN, _OFTEN_SHARE = 256, 1 / 16  # rows that are mended, whichever is fewer: half of the tokens of English text
_UNSEEN = 0.02  # times that a piece which calibration texts lack is taken to occur in them

Split = tuple[tuple[float, int], ...]  # up to which share of the rows, how many bits


def round_table(table: Floats, split: Split, seen: Sequence[Ids]) -> FewBitTable:
    """Round the rows of `table` [V, K], and mend those that occur in `seen` (token ids) most for their error.

    Pieces are numbered by how common they are, so `split` gives fewer bits to later ones.
    """
    rounded, scales = np.empty_like(table), np.empty((len(table), 1), dtype=np.float16)
    parts, first = [], 0
    for share, bits in split:
        last = round(share * len(table))
        states = np.empty((last - first, table.shape[1]), dtype=np.uint8)
        for start in range(first, last, _CHUNK):
            rows = slice(start, min(start + _CHUNK, last))
            chosen, scales[rows] = _round_rows(table[rows], bits)
            states[start - first : rows.stop - first] = chosen
            rounded[rows] = codebook(bits)[chosen] * scales[rows].astype(np.float32)
        parts.append(Rows(first, states, bits))
        first = last
    missing = table - rounded
    counts = np.bincount(np.concatenate([ids.ravel() for ids in seen]), minlength=len(table))
    cost = np.square(missing).sum(axis=1) * (counts + _UNSEEN)
    often = np.sort(np.argsort(-cost, kind="stable")[: min(_OFTEN, int(_OFTEN_SHARE * len(table)))])
    sizes = np.maximum(np.abs(missing[often]).max(axis=1, keepdims=True) / 127, 1e-6).astype(np.float16)
    steps = np.clip(np.rint(missing[often] / sizes.astype(np.float32)), -127, 127).astype(np.int8)
    return FewBitTable(parts, scales, often.astype(np.int64), steps, sizes)


def _round_rows(rows: Floats, bits: int) -> tuple[States, NDArray[np.float16]]:
    """The states of `rows` [R, K] and scales [R, 1]: fitted to the states by least squares, outliers apart."""
    scales = np.maximum(np.sqrt(np.mean(np.square(rows), axis=1, keepdims=True)), 1e-6)
    inside = np.abs(rows) < LIMIT * scales
    scales = np.maximum(np.sqrt((np.square(rows) * inside).sum(axis=1, keepdims=True) / rows.shape[1]), 1e-6)
    states = choose_states(rows / scales, bits, codebook(bits))
    values = codebook(bits)[states] * inside
    fitted = (values * rows).sum(axis=1, keepdims=True) / np.maximum(np.square(values).sum(axis=1, keepdims=True), 1e-9)
    return states, fitted.astype(np.float16)
