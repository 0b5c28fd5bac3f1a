"""Calibration: what the inputs of linear layers look like on real texts, and the range each is quantised over."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.tokenizer import Ids
from tasks.graphs.graph import Graph
from tasks.progress import Advance
from tasks.settings import CalibrationMethod

Batches = list[tuple[Ids, Ids]]

_BINS = 4096  # of the histogram over [-largest, largest]
_COARSE_BINS = 64
_PERCENTILE = 99.99
_LEVELS = 128  # magnitudes that int8 tells apart
_Histogram = NDArray[np.int64]


@dataclass(slots=True)
class Activations:
    """What one tensor was over all calibration texts; padding does not occur, each runs alone or with its equals."""

    low: float
    high: float
    channel_max: NDArray[np.float32]  # largest magnitude of each channel [K]
    histogram: _Histogram | None = None  # _BINS equal bins over [-limit, limit]
    products: NDArray[np.float64] | None = None  # mean of x xᵀ over the tokens of all texts [K, K]
    num_rows: int = 0  # how many those are

    @property
    def limit(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    def coarse_histogram(self) -> tuple[int, ...]:
        """The histogram in few bins, to look at."""
        assert self.histogram is not None, "observed with a histogram"
        return tuple(int(count) for count in self.histogram.reshape(_COARSE_BINS, -1).sum(axis=1))


def observe(
    graph: Graph, names: Iterable[str], batches: Batches, advance: Advance, with_histogram: bool = False,
    with_products: bool = False,
) -> dict[str, Activations]:  # fmt: skip
    """Run the calibration batches and describe each named tensor; a histogram needs a second pass for its range."""
    names = list(dict.fromkeys(names))
    run = _open(graph, names)
    seen: dict[str, Activations] = {}
    for batch in batches:
        for name, values in zip(names, run(batch), strict=True):
            _widen(seen, name, values.reshape(-1, values.shape[-1]), with_products)
        advance(1)
    if with_histogram:
        for batch in batches:
            for name, values in zip(names, run(batch), strict=True):
                _count(seen[name], values)
    for found in seen.values():
        if found.products is not None:
            found.products /= found.num_rows
    return seen


def choose_range(found: Activations, method: CalibrationMethod) -> tuple[float, float]:
    """The range to quantise a tensor over: all of it, or what `method` finds worth its steps. 0 is always inside."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if method == "minmax":
        return low, high
    assert found.histogram is not None, "observed with a histogram"
    if method == "percentile":  # its ends are those of bins
        lower, upper = _percentile_range(found.histogram, found.limit)
        return max(low, lower), min(high, upper)
    limit = _entropy_limit(_magnitudes(found.histogram), found.limit)
    return max(low, -limit), min(high, limit)


def _open(graph: Graph, names: list[str]) -> Callable[[tuple[Ids, Ids]], list[NDArray[np.float32]]]:
    """The graph on onnxruntime, giving the named tensors for a batch."""
    import onnx  # noqa: PLC0415  a cached run need not load it

    twin = graph.copy()
    del twin.model.graph.output[:]
    twin.model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = twin.open()

    def run(batch: tuple[Ids, Ids]) -> list[NDArray[np.float32]]:
        return list(session.run(names, {"input_ids": batch[0], "attention_mask": batch[1]}))

    return run


def _widen(seen: dict[str, Activations], name: str, rows: NDArray[np.float32], with_products: bool) -> None:
    low, high, channel_max = float(rows.min()), float(rows.max()), np.abs(rows).max(axis=0)
    found = seen.get(name)
    if found is None:
        found = seen[name] = Activations(low, high, channel_max)
        if with_products:
            found.products = np.zeros((rows.shape[1], rows.shape[1]))
    found.low, found.high = min(found.low, low), max(found.high, high)
    found.channel_max = np.maximum(found.channel_max, channel_max)
    if found.products is not None:
        found.products += rows.T @ rows
        found.num_rows += len(rows)


def _count(found: Activations, values: NDArray[np.float32]) -> None:
    # As numpy.histogram, five times as fast.
    places = ((values.ravel() + found.limit) * (_BINS / (2 * found.limit))).astype(np.intp)
    counts = np.bincount(np.minimum(places, _BINS - 1), minlength=_BINS)
    found.histogram = counts if found.histogram is None else found.histogram + counts


def _percentile_range(histogram: _Histogram, limit: float) -> tuple[float, float]:
    """Both ends cut by the same share of values."""
    shares = np.cumsum(histogram) / histogram.sum()
    edges = np.linspace(-limit, limit, _BINS + 1)
    cut = (1 - _PERCENTILE / 100) / 2
    low, high = edges[np.searchsorted(shares, cut, side="right")], edges[np.searchsorted(shares, 1 - cut) + 1]
    return min(float(low), 0.0), max(float(high), 0.0)


def _magnitudes(histogram: _Histogram) -> _Histogram:
    """The histogram of |x| [_BINS / 2]."""
    half = _BINS // 2
    return np.asarray(histogram[half:] + histogram[:half][::-1])


def _entropy_limit(counts: _Histogram, limit: float) -> float:
    """The magnitude to clip at that loses least information (Kullback-Leibler), as TensorRT's entropy calibrator."""
    total = len(counts)
    best, best_size = np.inf, total
    for size in range(_LEVELS, total + 1, _LEVELS // 8):
        clipped = counts[:size].astype(np.float64)
        clipped[-1] += counts[size:].sum()
        divergence = _divergence(clipped, counts[:size].astype(np.float64))
        if divergence < best:
            best, best_size = divergence, size
    return limit * best_size / total


def _divergence(reference: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """How far `counts`, told apart at _LEVELS levels only, is from `reference`."""
    level = np.arange(len(counts)) * _LEVELS // len(counts)
    mass = np.bincount(level, counts, _LEVELS)
    filled = np.bincount(level, counts > 0, _LEVELS)
    spread = np.where(counts > 0, (mass / np.maximum(filled, 1))[level], 0)
    p, q = reference / reference.sum(), spread / spread.sum()
    # A value that was clipped into an empty bin has no counterpart: a small one keeps the logarithm finite.
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())
