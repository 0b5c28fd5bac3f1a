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
    loss = relative_loss(candidate.mean(keepdims=True), teacher.mean(keepdims=True))
    return _measure(loss[0], relative_loss(_resampled_means(candidate), _resampled_means(teacher)))


def relative_loss(candidate: Values, teacher: Values) -> Values:
    """1 - candidate / teacher, score by score; NaN where the teacher's score is not above zero."""
    return 1 - np.divide(candidate, teacher, out=np.full_like(teacher, np.nan), where=teacher > 0)


def statistic_interval(statistic: Callable[..., Values], *sizes: int) -> Measurement:
    """Any statistic of one or more samples of the given sizes, with its interval; each sample is resampled by itself.

    `statistic` is given the rows drawn from each sample [R, N], the same in every call, and returns one value each [R].
    """
    rng = np.random.default_rng(_SEED)
    point = statistic(*(np.arange(size)[None] for size in sizes))[0]
    values = [
        statistic(*(rng.integers(0, size, (_CHUNK, size)) for size in sizes)) for _ in range(_RESAMPLES // _CHUNK // 2)
    ]
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
