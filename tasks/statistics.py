"""Paired bootstrap: every number comes with a 95 % interval, and two systems are compared on the same resamples."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from registry.gate import Measurement

_RESAMPLES = 2000
_CHUNK = 200
_SEED = 20261120

Values = NDArray[np.float64]


def mean_interval(values: Values) -> Measurement:
    """Mean of one value per text, with its percentile-bootstrap interval."""
    return _measure(values.mean(), _resampled_means(values))


def loss_interval(candidate: Values, teacher: Values) -> Measurement:
    """Relative loss of mean score, 1 - candidate / teacher, resampling queries in pairs.

    NaN where the teacher scores nothing, in whole or in a resample: the loss is not defined, and no gate passes on it.
    """
    if teacher.mean() == 0:
        return Measurement(float("nan"), float("nan"), float("nan"))
    weights = _weights(len(teacher))
    with np.errstate(divide="ignore", invalid="ignore"):
        losses = 1 - (weights @ candidate) / (weights @ teacher)
    return _measure(1 - candidate.mean() / teacher.mean(), losses)


def statistic_interval(statistic: Callable[[NDArray[np.intp]], Values], size: int, point: float) -> Measurement:
    """Interval of any statistic: it is given index resamples [R, N] and returns one value each [R]."""
    rng = np.random.default_rng(_SEED)
    values = [statistic(rng.integers(0, size, (_CHUNK, size))) for _ in range(_RESAMPLES // _CHUNK // 2)]
    return _measure(point, np.concatenate(values))


def _measure(point: float, resampled: Values) -> Measurement:
    low, high = np.quantile(resampled, (0.025, 0.975))
    # A skewed statistic (a minimum, say) can have its point outside the percentile interval: widen to include it.
    return Measurement(float(point), float(min(low, point)), float(max(high, point)))


def _resampled_means(values: Values) -> Values:
    means: Values = _weights(len(values)) @ values
    return means


@lru_cache(maxsize=2)  # the texts and the queries of a run: drawing takes longer than all that is computed with them
def _weights(size: int) -> Values:
    """Bootstrap weights [R, N], rows sum to 1; the same for every system, so comparisons are paired."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(size, np.full(size, 1 / size), size=_RESAMPLES) / size
