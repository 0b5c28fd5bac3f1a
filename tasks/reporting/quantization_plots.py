"""Pictures of a quantisation: how much each layer's rounding costs, and what was calibrated."""

import numpy as np
from matplotlib.figure import Figure

from tasks.quantization.built import InputRange, LayerDamage
from tasks.select import Study

_FEWER, _MORE, _CUT = "#57606a", "#0969da", "#cf222e"
_COLUMNS = 4


def plot_quantization(study: Study) -> dict[str, Figure]:
    """By file name: a sensitivity curve for each variant of mixed bits, histograms for the first QDQ one."""
    candidates = [row.candidate for row in study.judged]
    mixed = {candidate.variant.name: candidate.damages for candidate in candidates if candidate.damages}
    figures = {f"sensitivity_{name}": plot_sensitivity(name, damages) for name, damages in mixed.items()}
    calibrated = next((c for c in candidates if c.ranges), None)
    if calibrated:
        figures["calibration"] = plot_ranges(calibrated.variant.name, calibrated.ranges)
    return figures


def plot_sensitivity(name: str, damages: tuple[LayerDamage, ...]) -> Figure:
    """Each layer's own damage, the worst first; blue layers were given more bits."""
    ranked = sorted(damages, key=lambda layer: -layer.damage)
    fewer = min(layer.bits for layer in ranked)
    figure = Figure(figsize=(7.5, 0.2 * len(ranked) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = [_FEWER if layer.bits == fewer else _MORE for layer in ranked]
    axes.barh(range(len(ranked)), [max(layer.damage, 1e-7) for layer in ranked], color=colors)
    axes.set_yticks(range(len(ranked)), [f"{layer.layer} ({layer.bits} bits)" for layer in ranked], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"1 - mean cosine when the layer alone has {fewer} bits (further left is better)")
    axes.set_title(f"{name}: the most damaging layers were given more bits", fontsize=10)
    axes.grid(visible=True, axis="x", alpha=0.25)
    return figure


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
