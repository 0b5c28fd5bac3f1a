"""Weights in few bits, rounded so that a layer's output changes least (GPTQ): each row's error goes into later rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK = 128  # rows of a weight that share the scale of an output channel
_DAMPING = 0.01  # of the mean of the diagonal: inputs that hardly vary would take every error
_CLIPS = np.linspace(0.6, 1.0, 17)  # shares of the largest weight that a scale may cover


@dataclass(frozen=True, slots=True)
class FewBits:
    """A weight [K, N] as integers around `2 ** (bits - 1)` and float16 scales [K / block, N]."""

    values: NDArray[np.uint8]
    scales: NDArray[np.float16]
    bits: int
    block: int

    def widen(self) -> NDArray[np.float32]:
        """The weight that the integers stand for."""
        rows = np.repeat(self.scales.astype(np.float32), self.block, axis=0)[: len(self.values)]
        return (self.values.astype(np.float32) - (1 << (self.bits - 1))) * rows


def round_weight(weight: NDArray[np.float32], products: NDArray[np.float64], bits: int) -> FewBits:
    """Round `weight` [K, N] for inputs whose mean of x xᵀ is `products` [K, K]."""
    block = _BLOCK if len(weight) % _BLOCK == 0 else len(weight)
    middle = 1 << (bits - 1)
    spread = _error_spread(products)
    left = weight.astype(np.float64)
    importance = 1 / np.diag(spread) ** 2
    values = np.empty(weight.shape, dtype=np.uint8)
    scales = np.empty((len(weight) // block, weight.shape[1]), dtype=np.float16)
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        scale = scales[start // block] = _choose_scale(left[rows], importance[rows], middle)
        wide = scale.astype(np.float64)
        for row in range(start, start + block):
            steps = np.clip(np.rint(left[row] / wide), -middle, middle - 1)
            values[row] = steps + middle
            error = (left[row] - steps * wide) / spread[row, row]
            left[row + 1 :] -= np.outer(spread[row, row + 1 :], error)
    return FewBits(values, scales, bits, block)


def _error_spread(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper Cholesky factor of the damped inverse: how the error of a row is made good by the rows after it."""
    damped = products + np.eye(len(products)) * (_DAMPING * np.diag(products).mean() + 1e-12)
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T)


def _choose_scale(rows: NDArray[np.float64], importance: NDArray[np.float64], middle: int) -> NDArray[np.float16]:
    """For each output channel the scale with the least error, rows weighted by what their error costs."""
    limit = np.maximum(np.abs(rows).max(axis=0), 1e-6)
    best, least = limit / (middle - 0.5), np.full(rows.shape[1], np.inf)
    for clip in _CLIPS:
        scale = (clip * limit / (middle - 0.5)).astype(np.float16).astype(np.float64)
        restored = np.clip(np.rint(rows / scale), -middle, middle - 1) * scale
        error = ((restored - rows) ** 2 * importance[:, None]).sum(axis=0)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best.astype(np.float16)
