"""Figures of a benchmark: accuracy against time and images for all runs, and final accuracy against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from locsgd_dist.reporting import style
from locsgd_dist.reporting.comparison.figures import Figures
from locsgd_dist.reporting.comparison.grouping import Benchmark, Variant
from locsgd_dist.reporting.comparison.readings import frontier
from locsgd_dist.reporting.comparison.statistics import Summary
from locsgd_dist.reporting.drawing import DASHED, Drawing, LineStyle
from locsgd_dist.reporting.run_data import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, AXES_HEIGHT = 7.2, 3.5
"""Inches; the legend comes below the axes and adds to the height."""

_LEGEND_COLUMNS, _LEGEND_ROW = 3, 0.21
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.62, 0.15, 0.32, 0.52
# One more than there are colours: pairs of both repeat late.
_MARKERS = ("s", "^", "D", "v", "P", "X", "*", "p")
_SCHEDULE_MARKER = "o"


@dataclass(frozen=True)
class Look:
    """How a variant is drawn, alike in all figures of its benchmark."""

    color: str
    marker: str
    linestyle: LineStyle = "-"


@dataclass(frozen=True)
class Cost:
    """A horizontal axis: what of a curve or of a run's figures it shows, and in which unit."""

    name: str
    text: str
    unit: str
    divisor: float


def looks(benchmark: Benchmark) -> dict[Variant, Look]:
    """Plain SGD along its schedules in ink and grey, everything else in colours with markers of their own."""
    others = [v for v in benchmark.variants if v is not benchmark.baseline and v not in benchmark.schedules]
    colors = [light for light, _ in style.SERIES.values()]
    found: dict[Variant, Look] = {}
    if benchmark.baseline is not None:
        found[benchmark.baseline] = Look(style.INK, _SCHEDULE_MARKER)
    for variant in benchmark.schedules:
        found.setdefault(variant, Look(style.MUTED, _SCHEDULE_MARKER, DASHED))
    for index, variant in enumerate(others):
        line: LineStyle = "-" if index < len(colors) else DASHED
        found[variant] = Look(colors[index % len(colors)], _MARKERS[index % len(_MARKERS)], line)
    return found


def draw_accuracy(benchmark: Benchmark, figures: Figures, cost: str) -> Drawing | None:
    """Validation accuracy against what had been spent by then; None where no run knows its cost."""
    axis = _axis(cost, [figures.curves[run].cost(cost) for v in benchmark.variants for run in v.runs])
    if axis is None:
        return None
    shorter = [v for v in benchmark.schedules if v is not benchmark.baseline]
    figure, axes = _new_figure(len(benchmark.variants) - max(0, len(shorter) - 1))
    for variant, look in looks(benchmark).items():
        label = variant.name
        if variant in shorter:
            lengths = ", ".join(v.epochs_text for v in shorter)
            label = f"other SGD schedules ({lengths} epochs)" if variant is shorter[0] else ""
        _accuracy_of(axes, variant, figures, axis, look, label)
    floor = _floor([figures.curves[run].top1 for v in benchmark.variants for run in v.runs])
    is_cut = axes.get_ylim()[0] < floor
    if is_cut:
        axes.set_ylim(bottom=floor)
    axes.set_xlim(left=0)
    style.name_axis(axes, "validation top-1, %")
    style.name_x_axis(axes, f"{axis.text}, {axis.unit}")
    _legend(figure, axes)
    several = any(len(v.runs) > 1 for v in benchmark.variants)
    lines = "Thick lines: mean over seeds; thin ones: each seed." if several else "Every evaluated epoch."
    cut = " The axis begins where the differences do: first epochs lie below it." if is_cut else ""
    return figure, f"{lines} A marker stands at the end of training. Evaluations do not count as cost.{cut}"


def _floor(curves: Sequence[Array]) -> float:
    """Where the axis may begin, in percent: below the ends of the runs, and never within their later two thirds."""
    finals = [curve[-1] for curve in curves]
    below_finals = min(finals) - 0.5 * (max(finals) - min(finals)) - 0.03
    later = min(curve[len(curve) // 3 :].min() for curve in curves) - 0.01
    return 100 * float(min(below_finals, later))


def _accuracy_of(axes: Axes, variant: Variant, figures: Figures, axis: Cost, look: Look, label: str) -> None:
    curves = [figures.curves[run] for run in variant.runs]
    curves = [curve for curve in curves if np.isfinite(curve.cost(axis.name)).all()]
    if not curves:
        return
    if len(curves) > 1:
        for curve in curves:
            x = curve.cost(axis.name) / axis.divisor
            axes.plot(x, 100 * curve.top1, color=look.color, alpha=0.35, linewidth=0.8)
    # Seeds share their epochs: the mean is taken epoch by epoch, of the cost and of the accuracy.
    shared = sorted(set.intersection(*(set(curve.epochs) for curve in curves)))
    x = np.mean([curve.cost(axis.name)[np.isin(curve.epochs, shared)] for curve in curves], axis=0) / axis.divisor
    y = np.mean([curve.top1[np.isin(curve.epochs, shared)] for curve in curves], axis=0)
    (line,) = axes.plot(x, 100 * y, color=look.color, linestyle=look.linestyle, linewidth=1.8, label=label or None)
    line.set(marker=look.marker, markevery=[len(x) - 1], markersize=6)


def draw_frontier(benchmark: Benchmark, figures: Figures, cost: str) -> Drawing | None:
    """Final accuracy against the whole cost: a point per variant, and the line through SGD schedules to beat."""
    points = {v: (figures.of(v)[cost], _top1(figures.of(v)["final_error"])) for v in benchmark.variants}
    points = {v: point for v, point in points.items() if point[0].n}
    axis = _axis(cost, [np.array([_mean(spent)]) for spent, _ in points.values()])
    if axis is None:
        return None
    line = sorted((v for v in benchmark.schedules if v in points), key=lambda v: _mean(points[v][0]))
    is_line = len(line) > 1
    figure, axes = _new_figure(len(points) - len(line) + 1)
    if is_line:
        x, y = np.array([[_mean(value) for value in points[v]] for v in line]).T
        x = x / axis.divisor
        label = "SGD schedules: the line to beat"
        best = frontier(zip(x, y, strict=True))
        axes.plot(*zip(*best, strict=True), color=style.INK, linewidth=1.4, marker="o", markersize=7, label=label)
        axes.plot(x, y, color=style.INK, linestyle="none", marker="o", markersize=7)
        for variant, x_of, y_of in zip(line, x, y, strict=True):
            top = y_of + (points[variant][1].sd or 0.0)
            axes.annotate(
                f"{variant.epochs_text} epochs",
                (x_of, top),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=style.MUTED,
            )
    for variant, look in looks(benchmark).items():
        if variant not in points:
            continue
        spent, top1 = points[variant]
        x, y = _mean(spent) / axis.divisor, _mean(top1)
        color = style.INK if variant in line else look.color
        x_bar = None if spent.sd is None else spent.sd / axis.divisor
        axes.errorbar(x, y, xerr=x_bar, yerr=top1.sd, fmt="none", ecolor=color, elinewidth=1.1, capsize=2.5, zorder=2)
        if not (is_line and variant in line):
            axes.plot(x, y, color=color, linestyle="none", marker=look.marker, markersize=7, label=variant.name)
    axes.margins(0.08, 0.12)
    style.name_axis(axes, "final validation top-1, %")
    style.name_x_axis(axes, f"{axis.text} of the whole run, {axis.unit}")
    _legend(figure, axes)
    below = " Whatever lies below the line is beaten by a shorter schedule of plain SGD." if is_line else ""
    several = any(len(v.runs) > 1 for v in benchmark.variants)
    bars = " Bars: one standard deviation over seeds." if several else ""
    return figure, f"Up and to the left is better.{below}{bars}"


_AXES: dict[str, tuple[str, Sequence[tuple[float, str]]]] = {
    "seconds": ("training time", ((1, "s"), (60, "min"), (3600, "h"))),
    "cpu_seconds": ("processor time", ((1, "s"), (60, "min"), (3600, "h"))),
    "samples": ("training images", ((1, "images"), (1e3, "thousands"), (1e6, "millions"))),
    "flops": (
        "training operations",
        ((1, "FLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP")),
    ),
}
"""Cost → its name, and its units in ascending order."""


def _axis(cost: str, values: Sequence[Array]) -> Cost | None:
    """The unit in which the largest value is a handy number; None without any value."""
    finite = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.empty(0)
    if not finite.size:
        return None
    text, units = _AXES[cost]
    least = 3 if cost in ("seconds", "cpu_seconds") else 1
    divisor, unit = [pair for pair in units if finite.max() >= least * pair[0] or pair is units[0]][-1]
    return Cost(cost, text, unit, divisor)


def _new_figure(num_entries: int) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-num_entries // _LEGEND_COLUMNS)
    height = AXES_HEIGHT + rows * _LEGEND_ROW + 0.08
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    bottom = _BOTTOM + rows * _LEGEND_ROW + 0.08
    box = (_LEFT / WIDTH, bottom / height, 1 - (_LEFT + _RIGHT) / WIDTH, 1 - (bottom + _TOP) / height)
    axes = figure.add_axes(box)
    axes.grid(visible=True, axis="both")
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, in rows."""
    handles, labels = axes.get_legend_handles_labels()
    # matplotlib fills columns; the order of the tables reads along rows.
    rows = -(-len(handles) // _LEGEND_COLUMNS)
    order = [row * _LEGEND_COLUMNS + column for column in range(_LEGEND_COLUMNS) for row in range(rows)]
    order = [index for index in order if index < len(handles)]
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="lower left",
        bbox_to_anchor=(_LEFT / WIDTH, 0.0),
        ncols=_LEGEND_COLUMNS,
        borderaxespad=0.2,
        handlelength=1.8,
    )


def _top1(error: Summary) -> Summary:
    """Accuracy in percent from an error as a fraction."""
    return Summary({seed: 100 * (1 - value) for seed, value in error.per_seed.items()})


def _mean(summary: Summary) -> float:
    assert summary.mean is not None
    return summary.mean


FIGURES: dict[str, tuple[str, Callable[[Benchmark, Figures], Drawing | None]]] = {
    "frontier-flops": ("Final accuracy against operations", lambda b, f: draw_frontier(b, f, "flops")),
    "frontier-time": ("Final accuracy against training time", lambda b, f: draw_frontier(b, f, "seconds")),
    "frontier-cpu": ("Final accuracy against processor time", lambda b, f: draw_frontier(b, f, "cpu_seconds")),
    "accuracy-time": ("Accuracy over training time", lambda b, f: draw_accuracy(b, f, "seconds")),
    "accuracy-samples": ("Accuracy over training images", lambda b, f: draw_accuracy(b, f, "samples")),
}
"""Key (the name of its PNG) → title and drawing, which is None for want of data; in the order of the page."""
