"""GPTQ: a weight is rounded row by row, and each row's error goes into the rows after it, as far as inputs allow."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tasks.quantization.trellis import Floats

_DAMPING = 0.01  # of the mean of the diagonal: inputs that hardly vary would take every error
_LATER = 64  # rows after which errors go into all the rows that follow


def round_rows(weight: Floats, products: NDArray[np.float64], round_row: Callable[[int, Floats], Floats]) -> Floats:
    """`weight` [K, N] in rounded rows, for inputs whose mean of x xᵀ is `products` [K, K].

    `round_row` is given the number of each row [N], in order, with the errors so far in it, and rounds it.
    """
    spread, left = _spread_errors(products), weight.copy()
    for first in range(0, len(left), _LATER):
        last = min(first + _LATER, len(left))
        errors = np.empty((last - first, left.shape[1]), dtype=np.float32)
        for row in range(first, last):
            rounded = round_row(row, left[row])
            error = errors[row - first] = (left[row] - rounded) / spread[row, row]
            left[row + 1 : last] -= np.outer(spread[row, row + 1 : last], error)
            left[row] = rounded
        left[last:] -= spread[first:last, last:].T @ errors
    return left


def _spread_errors(products: NDArray[np.float64]) -> Floats:
    """Upper Cholesky factor of the damped inverse: how the error of a row is made good by the rows after it."""
    damped = products + np.eye(len(products)) * (_DAMPING * np.diag(products).mean() + 1e-12)
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
