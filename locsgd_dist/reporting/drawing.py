"""What the figures share: curves and steps over epochs, marks for changes, axes of epochs and of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from locsgd_dist.formatting import BYTE_UNITS
from locsgd_dist.reporting import style
from locsgd_dist.reporting.run_data import Array, RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawing: TypeAlias = "tuple[Figure, str]"
"""A figure, and what it shows of this run in a sentence or two."""

LineStyle: TypeAlias = str | tuple[int, tuple[int, ...]]
DASHED: LineStyle = (0, (4, 3))
DOTTED: LineStyle = (0, (1, 2))

FEW_POINTS = 12
"""Up to so many points of a curve, each is marked."""


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the report: `key` names its file in plots/; `draw` returns None for want of data."""

    key: str
    title: str
    draw: Callable[[RunData], Drawing | None]


def curve(axes: Axes, run: RunData, y: Array, color: str, label: str | None = None) -> None:
    """A line through the recorded points; the label is left out with the line if there are none."""
    recorded = np.isfinite(y)
    if recorded.any():
        marker = "o" if recorded.sum() <= FEW_POINTS else None
        axes.plot(run.epochs[recorded], y[recorded], color=color, label=label, marker=marker, markersize=3.5)


def steps(
    axes: Axes,
    run: RunData,
    y: Array,
    color: str,
    *,
    base: Array | float = 0.0,
    label: str | None = None,
    zorder: float = 2,
) -> None:
    """What holds for whole epochs: a filled step from `base` up to `y`; where nothing was recorded, a gap."""
    if np.isfinite(y).any():
        axes.stairs(y, epoch_edges(run), baseline=base, fill=True, color=color, alpha=0.28, linewidth=0, zorder=zorder)
        axes.stairs(y, epoch_edges(run), baseline=None, color=color, linewidth=1.8, label=label, zorder=zorder)
        from_zero(axes, y)


def mark_batch_changes(axes: Axes, run: RunData) -> None:
    """A dotted line where an epoch begins with another batch."""
    for epoch, _, _ in batch_changes(run):
        axes.axvline(epoch - 0.5, color=style.ORANGE, linewidth=1.1, linestyle=DOTTED, zorder=1.5)


def batch_changes(run: RunData) -> list[tuple[float, float, float]]:
    """(first epoch with the new size, size before, size after) of each change of the per-GPU batch."""
    sizes = run.series("per_gpu_batch")
    known = np.flatnonzero(np.isfinite(sizes))
    return [(run.epochs[b], sizes[a], sizes[b]) for a, b in pairwise(known) if sizes[a] != sizes[b]]


def mark_shifts(axes: Axes, run: RunData) -> None:
    """A short tick where an epoch begins with another boundary: they are too many for lines."""
    boundary = run.series("boundary")
    for epoch in run.epochs[1:][np.diff(boundary) > 0]:
        axes.axvline(epoch - 0.5, ymax=0.08, color=style.GREEN, linewidth=1.2, zorder=1.5)


def from_zero(axes: Axes, values: Array) -> None:
    """The axis starts at zero, so that heights can be compared, and leaves some room above the highest value."""
    axes.set_ylim(0, 1.12 * max(float(np.nanmax(values, initial=0.0)), 1e-12))


def epoch_axis(axes: Axes, run: RunData) -> None:
    """Whole epochs from the first to the last, each as wide as the others."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(run.epochs[0] - 0.5, run.epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    style.name_x_axis(axes, "epoch")


def epoch_edges(run: RunData) -> Array:
    """[E + 1] where epochs begin and end on the axis."""
    return np.append(run.epochs - 0.5, run.epochs[-1] + 0.5)


def byte_scale(values: Array) -> tuple[float, str]:
    """Divisor and name of the binary unit in which the largest of `values` is a handy number."""
    largest = max(float(np.nanmax(np.abs(values), initial=0.0)), 1.0)
    power = min(int(np.log2(largest) // 10), len(BYTE_UNITS) - 1)
    return 1024.0**power, BYTE_UNITS[power]


def relative_change(before: float, after: float) -> str:
    """`−47 %`, `+3 %`."""
    return "from zero" if before == 0 else f"{100 * (after / before - 1):+.0f} %".replace("-", "−")
