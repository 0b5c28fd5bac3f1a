"""How long an engine run takes, learned while serving. Pure: runs are told, nothing is measured here.

A run of B texts padded to T tokens takes about `overhead + per_token * B * T` seconds. The line is fitted by weighted
least squares on relative errors: runs of old fade out, those of the warm-up stay as a weak prior, so that the slope
remains known while only small batches are seen. A run far off the line (a preempted process) moves it by little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# What each observed run leaves of the weight of those before it: about the last hundred count.
_DECAY = 0.99
# The weight of a warm-up run, against 1 for a run while serving; it does not fade.
_PRIOR_WEIGHT = 2.0
# A run counts as at most this many times slower, or faster, than predicted.
_MAX_SURPRISE = 4.0
_SMALLEST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Run:
    """A measured engine run: tokens computed, padding included, and seconds."""

    padded_tokens: int
    seconds: float


class Quantile:
    """The `level` quantile of a stream of positive ratios, followed by steps; forgets as it goes."""

    _STEP = 0.02

    def __init__(self, level: float, start: float, low: float, high: float) -> None:
        self._level, self._low, self._high = level, low, high
        self.value = start

    def observe(self, ratio: float) -> None:
        """Take one ratio in: up by much when it lies above, down by little when below."""
        step = self._level if ratio > self.value else self._level - 1
        self.value = min(self._high, max(self._low, self.value * math.exp(self._STEP * step)))


class LatencyModel:
    """Seconds of an engine run by its padded tokens, and how far above that the 95th percentile lies."""

    def __init__(self, prior: Sequence[Run]) -> None:
        """`prior` are measured runs of at least two sizes."""
        self._prior = _Moments()
        for run in prior:
            self._prior.add(run.padded_tokens, run.seconds, _PRIOR_WEIGHT)
        self._recent = _Moments()
        # Replaced as a whole, so that another thread never sees half of it.
        self._line = _fit(self._prior, self._recent)
        self._tail = Quantile(0.95, start=1.25, low=1.0, high=4.0)

    @property
    def overhead_seconds(self) -> float:
        """What a run takes however small it is."""
        return self._line[0]

    @property
    def seconds_per_token(self) -> float:
        """What a further token takes."""
        return self._line[1]

    @property
    def overhead_tokens(self) -> float:
        """The overhead of a run, in tokens that could have been computed instead."""
        return self._line[0] / self._line[1]

    def predict(self, padded_tokens: int) -> float:
        """Expected seconds of a run."""
        overhead, per_token = self._line
        return overhead + per_token * padded_tokens

    def predict_p95(self, padded_tokens: int) -> float:
        """Seconds that 95 of 100 such runs stay within."""
        return self._tail.value * self.predict(padded_tokens)

    def max_tokens(self, seconds: float) -> int:
        """The most padded tokens whose predicted 95th percentile stays within `seconds`; 0 when none do."""
        overhead, per_token = self._line
        return max(0, int((seconds / self._tail.value - overhead) / per_token))

    def observe(self, run: Run) -> None:
        """Learn from a run."""
        expected = self.predict(run.padded_tokens)
        self._tail.observe(run.seconds / expected)
        seconds = min(max(run.seconds, expected / _MAX_SURPRISE), expected * _MAX_SURPRISE)
        self._recent.scale(_DECAY)
        self._recent.add(run.padded_tokens, seconds, 1.0)
        self._line = _fit(self._prior, self._recent)


class _Moments:
    """Sums that a weighted straight-line fit needs."""

    __slots__ = ("n", "x", "xx", "xy", "y")

    def __init__(self) -> None:
        self.n = self.x = self.xx = self.y = self.xy = 0.0

    def add(self, tokens: int, seconds: float, weight: float) -> None:
        """Add a point; its weight makes relative, not absolute, errors count alike."""
        weight /= max(seconds, _SMALLEST_SECONDS) ** 2
        self.n += weight
        self.x += weight * tokens
        self.xx += weight * tokens * tokens
        self.y += weight * seconds
        self.xy += weight * tokens * seconds

    def scale(self, factor: float) -> None:
        """Let what was added fade."""
        self.n *= factor
        self.x *= factor
        self.xx *= factor
        self.y *= factor
        self.xy *= factor


def _fit(prior: _Moments, recent: _Moments) -> tuple[float, float]:
    """(overhead, seconds per token) of the best line, neither below zero and the second above."""
    n, x, y = prior.n + recent.n, prior.x + recent.x, prior.y + recent.y
    xx, xy = prior.xx + recent.xx, prior.xy + recent.xy
    spread = n * xx - x * x
    slope = (n * xy - x * y) / spread if spread > 1e-9 * n * xx else xy / xx
    slope = max(slope, 1e-3 * xy / xx)  # noise on two near sizes: never free, never negative
    overhead = (y - slope * x) / n
    if overhead < 0:
        return 0.0, xy / xx
    return overhead, slope
