"""Pictures of a run: the Pareto plot and the latency CDF, as matplotlib figures (no display, no global state)."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.benchmark import TORCH
from tasks.select import Study
from tasks.steps import StepRecord, read_step

_KIND_COLORS = ("#0969da", "#8250df")
_VERDICT_COLORS = {"pass": "#1a7f37", "caution": "#bf8700", "fail": "#cf222e"}


def plot_pareto(study: Study) -> Figure:
    """Throughput against cosine to the teacher; area is size, colour is the verdict, a ring is the Pareto front."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for row in study.judged:
        x, y = row.speed.throughput_per_s, row.quality.metrics["cosine_mean"].value
        area = 40 + 6 * row.size_mb
        axes.scatter(
            x,
            y,
            s=area,
            color=_VERDICT_COLORS[row.gate.verdict],
            alpha=0.75,
            edgecolors="black" if row.is_on_pareto_front else "none",
            linewidths=1.5,
        )
        axes.annotate(
            f"{row.name} ({row.size_mb:.0f} MB)",
            (x, y),
            xytext=(0, -9 - area**0.5 / 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    torch_speed = study.speeds.speeds[TORCH].throughput_per_s
    axes.scatter(torch_speed, 1.0, marker="x", color="#57606a")
    axes.annotate(TORCH, (torch_speed, 1.0), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8)
    _draw_limit(axes, study.limits.cosine_mean_pass)
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel("throughput at batch 32, texts/s (further right is better)")
    axes.set_ylabel("mean cosine to the teacher")
    axes.set_title("Quality against speed: green passes the gate, ringed is on the Pareto front", fontsize=10)
    axes.grid(visible=True, alpha=0.25)
    return figure


def plot_latency_cdf(study: Study) -> Figure:
    """Share of single-text requests answered within a time, one line a system."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in [*(row.name for row in study.judged), TORCH]:
        values = np.sort(study.speeds.speeds[name].latencies_ms)
        style = "--" if name == TORCH else "-"
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name, linestyle=style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    axes.set_xlabel(f"latency of one text, ms (mean {study.speeds.mean_tokens:.0f} tokens; further left is better)")
    axes.set_ylabel("share answered")
    axes.set_title("Latency at batch 1", fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return figure


def plot_pruning_profile(record: StepRecord) -> Figure:
    """What each layer kept of its heads and feed-forward neurons, as shares with the numbers on the bars."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    details = record.details
    for axes, name, color in zip(figure.subplots(1, 2, sharey=True), ("heads", "widths"), _KIND_COLORS, strict=True):
        kept, before = details[name], details[f"{name}_before"]
        shares = [now / full for now, full in zip(kept, before, strict=True)]
        bars = axes.bar(range(len(kept)), shares, color=color, alpha=0.75)
        axes.bar_label(bars, [f"{now}/{full}" for now, full in zip(kept, before, strict=True)], fontsize=7)
        axes.set_xticks(range(len(kept)))
        axes.set_xlabel("layer")
        axes.set_title({"heads": "attention heads", "widths": "feed-forward neurons"}[name], fontsize=10)
        axes.set_ylim(0, 1.1)
    figure.axes[0].set_ylabel("share kept")
    return figure


def plot_steps(study: Study) -> dict[str, Figure]:
    """By name, the pictures that steps left: of training the loss curve, of pruning the layers' profile.

    A name is the kind of the step and the digest of the model it made: a recipe may have two steps of one kind.
    """
    figures = {}
    for row in study.judged:
        record, digest = read_step(row.model.folder), row.model.digest
        while record is not None:
            name = f"{record.config.kind}-{digest[:8]}"
            if record.details.get("curve"):
                figures[name] = _plot_curve(str(record.config), record.details)
            if record.config.kind == "prune":
                figures[f"{name}-profile"] = plot_pruning_profile(record)
            digest, record = record.start, record.before
    return figures


def _plot_curve(title: str, details: dict[str, Any]) -> Figure:
    """The loss and, beside it, the cosine on held-out texts."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    loss = figure.subplots()
    cosine = loss.twinx()
    steps = [point["step"] for point in details["curve"]]
    loss.plot(steps, [point["loss"] for point in details["curve"]], color="#57606a")
    cosine.plot(steps, [point["held_out_cosine"] for point in details["curve"]], color="#0969da", marker=".")
    loss.set_xlabel(f"steps, {details['num_texts']} texts")
    loss.set_ylabel("loss (grey)")
    cosine.set_ylabel("cosine to the teacher on held-out texts (blue)")
    loss.set_title(title[:1].upper() + title[1:], fontsize=10)
    loss.grid(visible=True, alpha=0.25)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element to put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_limit(axes: Axes, limit: float) -> None:
    axes.axhline(limit, color="#57606a", linewidth=0.8, linestyle="--")
    where = ("axes fraction", "data")
    axes.annotate(f"gate: {limit}", (0.995, limit), xycoords=where, ha="right", va="bottom", fontsize=8)
