"""Curves over epochs and over wall time. Each function draws one figure of a run, or returns None for want of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from locsgd_dist.formatting import format_bytes, format_count, format_duration, format_percent, is_number
from locsgd_dist.reporting import style
from locsgd_dist.reporting.memory_trace import SOURCES
from locsgd_dist.reporting.run_data import Array, RunData, finite, first_and_last

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawing = tuple["Figure", str]
"""A figure and what it shows of this run, in a sentence or two."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FEW = 12
"""Up to so many points each one is marked."""


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the report: `key` names its file in plots/, `draw` makes it."""

    key: str
    title: str
    draw: Callable[[RunData], Drawing | None]


def draw_footprint(run: RunData) -> Drawing | None:
    """Footprint and per-GPU batch per epoch (the paper's figure 4)."""
    footprint, batch = run.series("footprint_bytes"), run.series("per_gpu_batch")
    ends = first_and_last(footprint)
    if ends is None:
        return None
    first, last = ends
    figure, (upper, lower) = style.new_figure((2.2, 1))
    scale, unit = byte_scale(footprint)
    curve(upper, run.epochs, footprint / scale, style.BLUE)
    upper.axhline(first / 2 / scale, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), label="half of the first epoch")
    upper.set_ylim(0, 1.12 * np.nanmax(footprint) / scale)
    style.name_axis(upper, f"footprint, {unit}")
    style.legend(upper)
    caption = f"{format_bytes(first)} in the first epoch, {format_bytes(last)} in the last ({_change(first, last)})."
    if source := run.last("footprint_source"):
        caption += f" Measured by {source}, the highest of all ranks."
    steps(lower, run.epochs, batch, style.ORANGE)
    style.name_axis(lower, "batch per GPU")
    for epoch, before, after in batch_changes(run):
        mark_epoch(upper, epoch)
        caption += f" Batch {before:g} → {after:g} at epoch {epoch:g}."
    _epoch_axis(lower, run)
    return figure, caption


def draw_boundary(run: RunData) -> Drawing | None:
    """Boundary per epoch (the paper's figure 3): layers below it learn locally, the others by SGD."""
    boundary, num_layers = run.series("boundary"), run.series("num_layers")
    ends = first_and_last(boundary)
    if ends is None:
        return None
    figure, (axes,) = style.new_figure()
    total = finite(num_layers)[-1] if finite(num_layers).size else np.nanmax(boundary)
    steps(axes, run.epochs, boundary, style.TEAL, label="localized")
    axes.set_ylim(0, max(total, 1))
    lmax = run.setting("selection", "lmax")
    if is_number(lmax) and lmax < 1:
        axes.axhline(lmax * total, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"lmax {lmax:g}")
    style.name_axis(axes, f"boundary, of {total:g} layers")
    style.legend(axes)
    _integer_ticks(axes)
    _epoch_axis(axes, run)
    shifts = int((np.diff(finite(boundary)) > 0).sum())
    caption = f"{shifts} shift{'s' * (shifts != 1)}: boundary {ends[0]:g} in the first epoch, {ends[1]:g} of {total:g} in the last."
    return figure, caption


def draw_memory_trace(run: RunData) -> Drawing | None:
    """Memory of every rank over wall time, with what happened meanwhile."""
    if not run.traces:
        return None
    figure, (axes,) = style.new_figure()
    start = min(trace.times[0] for trace in run.traces)
    span = max(trace.times[-1] for trace in run.traces) - start
    seconds, time_unit = (1.0, "s") if span < 180 else (60.0, "min") if span < 10800 else (3600.0, "h")
    peak = max(np.nanmax(trace.values) for trace in run.traces)
    scale, unit = byte_scale(np.array([peak]))
    colors = (style.BLUE, style.ORANGE, style.PURPLE, style.TEAL)
    few = len(run.traces) <= len(colors)
    for index, trace in enumerate(run.traces):
        axes.plot(
            (trace.times - start) / seconds,
            trace.values / scale,
            color=colors[index] if few else style.BLUE,
            linewidth=1.2,
            alpha=1.0 if few else 0.5,
            label=f"rank {trace.rank}" if few else f"{len(run.traces)} ranks" if index == 0 else None,
        )
    axes.set_ylim(0, 1.15 * peak / scale)
    counted = _mark_events(axes, run, start, span, seconds)
    style.name_axis(axes, f"memory, {unit}")
    style.legend(axes, num_columns=6)
    axes.set_xlabel(f"wall time, {time_unit}")
    caption = f"{SOURCES[run.traces[0].source]}: at most {format_bytes(peak)} over {format_duration(span)}."
    return figure, f"{caption} {counted}".rstrip()


def _mark_events(axes: Axes, run: RunData, start: float, span: float, seconds: float) -> str:
    """Marks what changes memory; returns how often each happened."""
    kinds = {
        "shift": ("shift", style.GREEN, (0, (1, 2.5))),
        "batch": ("batch", style.ORANGE, (0, (4, 3))),
        "oom": ("out of memory", style.RED, "solid"),
        "resume": ("resume", style.PURPLE, (0, (4, 2, 1, 2))),
    }
    counts = []
    for kind, (label, color, line) in kinds.items():
        times = [e["time"] for e in run.events if e.get("type") == kind and is_number(e.get("time"))]
        times = [time for time in times if 0 <= time - start <= span]
        for index, time in enumerate(times):
            x = (time - start) / seconds
            axes.axvline(x, color=color, linewidth=1.1, linestyle=line, label=None if index else label, zorder=1.5)
        if times:
            counts.append(f"{label} {len(times)}×")
    return f"Marked: {', '.join(counts)}." if counts else ""


def draw_traffic(run: RunData) -> Drawing | None:
    """Bytes that a rank exchanges in an epoch, gradients and replicas apart, and the number of gradient exchanges."""
    gradients, replicas = run.series("grad_all_reduce_bytes"), run.series("replica_sync_bytes")
    plain, count = run.series("plain_ddp_bytes"), run.series("grad_all_reduce_count")
    if not (finite(gradients).size or finite(replicas).size):
        return None
    figure, panels = style.new_figure((2.2, 1) if finite(count).size else (1,))
    upper = panels[0]
    total = np.nan_to_num(gradients) + np.nan_to_num(replicas)
    scale, unit = byte_scale(np.concatenate([total, plain]))
    steps(upper, run.epochs, gradients / scale, style.BLUE, label="gradients")
    steps(upper, run.epochs, total / scale, style.ORANGE, base=np.nan_to_num(gradients) / scale, label="replicas")
    if finite(plain).size:
        edges = _edges(run.epochs)
        upper.stairs(plain / scale, edges, baseline=None, color=style.INK, linewidth=1.2, linestyle=(0, (4, 3)), label="plain DDP")
    upper.set_ylim(0, 1.12 * max(np.nanmax(np.concatenate([total, plain])) / scale, 1e-9))
    style.name_axis(upper, f"{unit} per epoch and rank")
    style.legend(upper)
    if len(panels) > 1:
        steps(panels[1], run.epochs, count, style.TEAL)
        style.name_axis(panels[1], "gradient all-reduces per epoch")
    _epoch_axis(panels[-1], run)
    caption = f"Gradients {format_bytes(np.nansum(gradients))}, replicas {format_bytes(np.nansum(replicas))} per rank over the run"
    both = np.isfinite(plain)
    if both.any() and plain[both].sum() > 0:
        share = total[both].sum() / plain[both].sum()
        caption += f": {format_percent(share)} of plain DDP's {format_bytes(plain[both].sum())}"
    return figure, caption + "."


def draw_accuracy(run: RunData) -> Drawing | None:
    """Top-1 accuracy of training and validation."""
    curves = {
        "training": (run.series("train_top1"), style.MUTED),
        "validation": (run.series("val_top1"), style.BLUE),
        "validation, EMA": (run.series("ema_val_top1"), style.PURPLE),
    }
    if not any(finite(values).size for values, _ in curves.values()):
        return None
    figure, (axes,) = style.new_figure()
    for label, (values, color) in curves.items():
        curve(axes, run.epochs, 100 * values, color, label=label)
    caption = "Training accuracy only: nothing was validated."
    validation = curves["validation"][0]
    if finite(validation).size:
        best = int(np.nanargmax(validation))
        axes.plot(run.epochs[best], 100 * validation[best], marker="o", markersize=5, color=style.BLUE)
        caption = f"Validation: best {format_percent(validation[best])} in epoch {run.epochs[best]:g}, "
        caption += f"last {format_percent(finite(validation)[-1])}."
    style.name_axis(axes, "top-1, %")
    style.legend(axes)
    _epoch_axis(axes, run)
    return figure, caption


def draw_loss(run: RunData) -> Drawing | None:
    """Training and validation loss; epochs after which weak supervision turned the sign are marked."""
    train, val = run.series("train_loss"), run.series("val_loss")
    if not (finite(train).size or finite(val).size):
        return None
    figure, (axes,) = style.new_figure()
    curve(axes, run.epochs, train, style.MUTED, label="training")
    curve(axes, run.epochs, val, style.BLUE, label="validation")
    style.name_axis(axes, "loss")
    style.legend(axes)
    _epoch_axis(axes, run)
    parts = [
        f"{name} {ends[0]:.3g} → {ends[1]:.3g}"
        for name, values in (("Training", train), ("validation", val))
        if (ends := first_and_last(values))
    ]
    return figure, ", ".join(parts) + "."


def draw_learning_rates(run: RunData) -> Drawing | None:
    """Learning rates of the SGD region and of the localized updates, and the epochs of negative sign."""
    rate, local = run.series("lr"), run.series("local_lr")
    values = finite(np.concatenate([rate, local]))
    if not values.size:
        return None
    figure, (axes,) = style.new_figure()
    if (values > 0).any() and values.max() > 20 * values[values > 0].min():
        axes.set_yscale("log")
        rate, local = (np.where(series > 0, series, np.nan) for series in (rate, local))
    curve(axes, run.epochs, rate, style.BLUE, label="SGD")
    curve(axes, run.epochs, local, style.TEAL, label="localized")
    negative = run.epochs[run.series("sign") < 0]
    if negative.size:
        axes.plot(
            negative,
            np.full(negative.size, 0.03),
            transform=axes.get_xaxis_transform(),
            marker="v",
            markersize=4.5,
            linestyle="none",
            color=style.RED,
            label="sign −1",
        )
    style.name_axis(axes, "learning rate")
    style.legend(axes)
    _epoch_axis(axes, run)
    ends = [f"{name} {e[0]:.3g} → {e[1]:.3g}" for name, s in (("SGD", rate), ("localized", local)) if (e := first_and_last(s))]
    caption = ", ".join(ends) + "."
    if negative.size:
        caption += f" Weak supervision turned the sign of localized updates in {negative.size} of {len(run.metrics)} epochs."
    return figure, caption


def draw_throughput(run: RunData) -> Drawing | None:
    """Training images per second over all ranks; dotted lines mark changes of the batch."""
    speed = run.series("images_per_second")
    ends = first_and_last(speed)
    if ends is None:
        return None
    figure, (axes,) = style.new_figure()
    curve(axes, run.epochs, speed, style.BLUE)
    axes.set_ylim(0, 1.12 * max(np.nanmax(speed), 1e-9))
    for epoch, _, _ in batch_changes(run):
        mark_epoch(axes, epoch)
    style.name_axis(axes, "images per second, all ranks")
    _thousands(axes)
    _epoch_axis(axes, run)
    caption = f"{format_count(ends[0])} img/s in the first epoch, {format_count(ends[1])} in the last ({_change(*ends)})."
    return figure, caption


def draw_update_norm(run: RunData) -> Drawing | None:
    """The transition layer's update norm, from which dynamic selection takes its decision."""
    norm, per_rate = run.series("transition_update_norm"), run.series("transition_update_norm_per_lr")
    ends = first_and_last(norm)
    if ends is None:
        return None
    both = bool(finite(per_rate).size)
    figure, panels = style.new_figure((1, 1) if both else (1,))
    for axes, values, name in zip(panels, (norm, per_rate), ("‖ΔW‖ of the transition layer", "‖ΔW‖ / Σ learning rate"), strict=False):
        curve(axes, run.epochs, values, style.BLUE)
        axes.set_ylim(0, 1.12 * max(np.nanmax(values), 1e-12))
        style.name_axis(axes, name)
        for epoch in shift_epochs(run):
            mark_epoch(axes, epoch, style.GREEN)
    _epoch_axis(panels[-1], run)
    return figure, f"{ends[0]:.3g} in the first epoch, {ends[1]:.3g} in the last. Dotted lines: the boundary shifts, another layer is measured."


def curve(axes: Axes, x: Array, y: Array, color: str, label: str | None = None) -> None:
    """A line through the recorded points; the label is left out with the line if there are none."""
    recorded = np.isfinite(y)
    if recorded.any():
        marker = "o" if recorded.sum() <= _FEW else None
        axes.plot(x[recorded], y[recorded], color=color, label=label, marker=marker, markersize=3.5)


def steps(axes: Axes, x: Array, y: Array, color: str, base: Array | float = 0.0, label: str | None = None) -> None:
    """What holds for whole epochs: a filled step from `base` up to `y`; where nothing was recorded, a gap."""
    if np.isfinite(y).any():
        axes.stairs(y, _edges(x), baseline=base, fill=True, color=color, alpha=0.28, linewidth=0)
        axes.stairs(y, _edges(x), baseline=None, color=color, linewidth=1.8, label=label)
        axes.set_ylim(0, 1.15 * max(np.nanmax(y), 1e-12))


def batch_changes(run: RunData) -> list[tuple[float, float, float]]:
    """(first epoch with the new size, size before, size after) of each change of the per-GPU batch."""
    sizes = run.series("per_gpu_batch")
    known = np.flatnonzero(np.isfinite(sizes))
    pairs = zip(known[:-1], known[1:], strict=True)
    return [(run.epochs[b], sizes[a], sizes[b]) for a, b in pairs if sizes[a] != sizes[b]]


def shift_epochs(run: RunData) -> Array:
    """First epochs with a new boundary."""
    boundary = run.series("boundary")
    return run.epochs[1:][np.diff(boundary) > 0]


def mark_epoch(axes: Axes, epoch: float, color: str = style.ORANGE) -> None:
    """A dotted line where `epoch` begins."""
    axes.axvline(epoch - 0.5, color=color, linewidth=1.1, linestyle=(0, (1, 2)), zorder=1.5)


def byte_scale(values: Array) -> tuple[float, str]:
    """Divisor and name of the binary unit in which the largest of `values` is a handy number."""
    largest = max(float(np.nanmax(np.abs(values), initial=0.0, where=np.isfinite(values))), 1.0)
    power = min(int(np.log2(largest) // 10), len(_UNITS) - 1)
    return 1024.0**power, _UNITS[power]


def _edges(epochs: Array) -> Array:
    return np.append(epochs - 0.5, epochs[-1] + 0.5)


def _change(before: float, after: float) -> str:
    """`−47 %`, `+3 %`."""
    if before == 0:
        return "from zero"
    return f"{100 * (after / before - 1):+.0f} %".replace("-", "−")


def _epoch_axis(axes: Axes, run: RunData) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(run.epochs[0] - 0.5, run.epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _integer_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _thousands(axes: Axes) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
