"""Pictures of a quantisation: how much each layer's rounding costs, and what was calibrated."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.quantization.built import InputRange, LayerDamage
from tasks.quantize import Candidate
from tasks.select import Study

_FEWER, _MORE, _CUT = "#57606a", "#0969da", "#cf222e"
_COLUMNS = 4


def plot_quantization(study: Study) -> dict[str, Figure]:
    """By file name: sensitivity for each variant whose layers were measured, histograms for the first QDQ one."""
    candidates = [row.candidate for row in study.judged]
    figures = {f"sensitivity_{each.variant.name}": plot_sensitivity(each) for each in candidates if each.damages}
    calibrated = next((c for c in candidates if c.ranges), None)
    if calibrated:
        figures["calibration"] = plot_ranges(calibrated.variant.name, calibrated.ranges)
    return figures


def plot_sensitivity(candidate: Candidate) -> Figure:
    """Each layer's own damage, the worst first, blue ones were given more bits; below the cosine by layers kept."""
    ranked = sorted(candidate.damages, key=lambda layer: -layer.damage)
    fewer = min(layer.bits for layer in ranked)
    heights = [0.2 * len(ranked) + 1.2, *([2.6] if candidate.curve else [])]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    axes, *rest = figure.subplots(len(heights), squeeze=False, height_ratios=heights).flat
    colors = [_FEWER if layer.bits == fewer else _MORE for layer in ranked]
    axes.barh(range(len(ranked)), [max(layer.damage, 1e-7) for layer in ranked], color=colors)
    axes.set_yticks(range(len(ranked)), [f"{layer.layer} ({layer.bits} bits)" for layer in ranked], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"1 - mean cosine when the layer alone has {fewer} bits (further left is better)")
    axes.set_title(f"{candidate.variant.name}: {_describe_choice(ranked, fewer)}", fontsize=10)
    axes.grid(visible=True, axis="x", alpha=0.25)
    for below in rest:
        _draw_curve(below, candidate)
    return figure


def _describe_choice(layers: list[LayerDamage], fewer: int) -> str:
    given = sum(layer.bits > fewer for layer in layers)
    if not given:
        return f"no layer needs more than {fewer} bits; the most damaging first"
    return f"the most damaging layers were given more bits, {given} of {len(layers)}"


def _draw_curve(axes: Axes, candidate: Candidate) -> None:
    """The mean cosine against the number of layers in float, its interval's low end, the limit and the choice."""
    kept = [point.num_kept for point in candidate.curve]
    axes.plot(kept, [point.cosine for point in candidate.curve], color=_MORE, marker=".")
    axes.plot(kept, [point.low for point in candidate.curve], color=_FEWER, linewidth=0.8, linestyle=":")
    axes.axvline(sum(layer.is_float for layer in candidate.damages), color=_CUT, linewidth=0.8)
    limit = candidate.variant.qdq.min_cosine if candidate.variant.qdq else None
    if limit is not None and limit <= 1:
        axes.axhline(limit, color=_FEWER, linewidth=0.8, linestyle="--")
    axes.set_xlabel("most damaging layers left in float (red: as built)")
    axes.set_ylabel("mean cosine; dotted: bad end")
    axes.grid(visible=True, alpha=0.25)


def plot_ranges(name: str, ranges: tuple[InputRange, ...]) -> Figure:
    """Histogram of every quantised input, with the ends of its range."""
    rows = -(-len(ranges) // _COLUMNS)
    height = 1.5 * rows + 0.6
    figure = Figure(figsize=(9, height))
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    figure.subplots_adjust(0.02, 0.3 / height, 0.98, 1 - 0.6 / height, wspace=0.08, hspace=0.4)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, each in zip(grid.flat, ranges, strict=False):
        axes.set_axis_on()
        edges = np.linspace(-each.limit, each.limit, len(each.counts) + 1)
        # Without an axis for the counts: scales and their layout take seconds for the two dozen of a small model.
        axes.stairs(np.log10(np.array(each.counts) + 1.0), edges, fill=True, color=_FEWER)
        for end in (each.low, each.high):
            axes.axvline(end, color=_CUT, linewidth=0.8)
        axes.set_yticks([])
        axes.set_title(each.layer, fontsize=6)
        axes.tick_params(labelsize=6)
    figure.suptitle(
        f"{name}: inputs of linear layers on calibration texts, logarithmic counts; red: the range quantised over",
        fontsize=9,
    )
    return figure
