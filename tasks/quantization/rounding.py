"""Weights in few bits, rounded so that a layer's output changes least (GPTQ): each row's error goes into later rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.quantization.gptq import round_rows
from tasks.quantization.trellis import LIMIT, Floats, States, choose_states, codebook

_RUN = 24  # numbers that are chosen together at least; more would cost no less


@dataclass(frozen=True, slots=True)
class FewBits:
    """A weight [K, N]: states of `runs` runs [R, K * N / R], and what turns their values into the weight.

    A value is multiplied by the factor of its row [K] and the scale of its column [N]; run r has the columns from
    r * N / R. A few weights, at `places` of the flat weight, are `exact` instead.
    """

    states: States
    factors: NDArray[np.float16]
    scales: NDArray[np.float16]
    places: NDArray[np.int32]
    exact: NDArray[np.float16]
    bits: int

    def widen(self) -> Floats:
        """The weight that the bits stand for."""
        rows, columns = len(self.factors), len(self.scales)
        weight = _unroll(codebook(self.bits)[self.states], rows, columns)
        weight *= self.factors.astype(np.float32)[:, None] * self.scales.astype(np.float32)
        weight.flat[self.places] = self.exact
        return weight


def round_weight(weight: Floats, products: NDArray[np.float64], bits: int) -> FewBits:
    """Round `weight` [K, N] for inputs whose mean of x xᵀ is `products` [K, K]."""
    rows, columns = weight.shape
    runs = count_runs(columns)
    factors, scales = _choose_scales(weight)
    unit = factors.astype(np.float32)[:, None] * scales.astype(np.float32)
    values = codebook(bits)
    states = np.empty((runs, rows, columns // runs), dtype=np.uint8)
    is_exact = np.zeros(weight.shape, dtype=bool)

    def round_row(row: int, own: Floats) -> Floats:
        numbers = own / unit[row]
        far = is_exact[row] = np.abs(numbers) > LIMIT
        worth = (~far).astype(np.float32).reshape(runs, -1) if far.any() else None
        numbers = np.where(far, 0, numbers).reshape(runs, -1)
        before = states[:, row - 1, -1] if row else np.zeros(runs, dtype=np.uint8)
        states[:, row] = choose_states(numbers, bits, values, before, worth)
        return np.where(far, own.astype(np.float16), values[states[:, row]].ravel() * unit[row])

    rounded = round_rows(weight, products, round_row)
    places = np.flatnonzero(is_exact).astype(np.int32)
    exact = rounded.ravel()[places].astype(np.float16)
    few = FewBits(states.reshape(runs, -1), factors, scales, places, exact, bits)
    return _fit_scales(few, weight, products)


def count_runs(columns: int) -> int:
    """Runs that a row of `columns` numbers is cut into, to be chosen side by side."""
    runs = 1
    while columns % (2 * runs) == 0 and columns // (2 * runs) >= _RUN:
        runs *= 2
    return runs


def _unroll(numbers: Floats, rows: int, columns: int) -> Floats:
    """From runs [R, K * N / R] to the weight [K, N]."""
    return numbers.reshape(len(numbers), rows, -1).transpose(1, 0, 2).reshape(rows, columns)


def _choose_scales(weight: Floats) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """A factor for each row and a scale for each column, so that what both divide is about normal; outliers apart."""
    factors = np.maximum(np.sqrt(np.mean(np.square(weight / _spread_of(weight)), axis=1)), 1e-3).astype(np.float16)
    numbers = weight / factors.astype(np.float32)[:, None]
    scales = _spread_of(numbers)
    inside = np.abs(numbers) < LIMIT * scales
    scales = np.sqrt((np.square(numbers) * inside).sum(axis=0) / np.maximum(inside.sum(axis=0), 1))
    return factors, np.maximum(scales, 1e-6).astype(np.float16)


def _spread_of(weight: Floats) -> Floats:
    return np.maximum(np.sqrt(np.mean(np.square(weight), axis=0)), 1e-6)


def _fit_scales(few: FewBits, weight: Floats, products: NDArray[np.float64]) -> FewBits:
    """The same states with scales by least squares of the layer's output."""
    rounded = few.widen()
    fixed = np.zeros_like(rounded)
    fixed.flat[few.places] = rounded.flat[few.places]
    rounded -= fixed
    seen = products.astype(np.float32) @ rounded
    better = (seen * (weight - fixed)).sum(axis=0) / np.maximum((seen * rounded).sum(axis=0), 1e-12)
    scales = few.scales.astype(np.float32) * np.clip(better, 0.5, 2)
    return FewBits(few.states, few.factors, scales.astype(np.float16), few.places, few.exact, few.bits)
