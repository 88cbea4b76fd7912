"""Figures of what training costs: memory, traffic, time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from locsgd_dist.formatting import format_bytes, format_count, format_duration, format_percent, is_number
from locsgd_dist.reporting import style
from locsgd_dist.reporting.drawing import (
    DASHED,
    DOTTED,
    Drawing,
    LineStyle,
    batch_changes,
    byte_scale,
    curve,
    epoch_axis,
    epoch_edges,
    from_zero,
    mark_batch_changes,
    relative_change,
    steps,
)
from locsgd_dist.reporting.memory_trace import SOURCES
from locsgd_dist.reporting.run_data import RunData, finite, first_and_last

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_footprint(run: RunData) -> Drawing | None:
    """Footprint and per-GPU batch per epoch (the paper's figure 4)."""
    footprint, batch = run.series("footprint_bytes"), run.series("per_gpu_batch")
    ends = first_and_last(footprint)
    if ends is None:
        return None
    first, last = ends
    figure, (upper, lower) = style.new_figure((2.2, 1))
    scale, unit = byte_scale(footprint)
    curve(upper, run, footprint / scale, style.BLUE)
    upper.axhline(first / 2 / scale, color=style.MUTED, linewidth=1, linestyle=DASHED, label="half of the first epoch")
    from_zero(upper, footprint / scale)
    style.name_axis(upper, f"footprint, {unit}")
    style.legend(upper)
    caption = (
        f"{format_bytes(first)} in the first epoch, {format_bytes(last)} in the last ({relative_change(first, last)})."
    )
    if source := run.last("footprint_source"):
        caption += f" Measured by {str(source).replace('_', ' ')}, the highest of all ranks."
    steps(lower, run, batch, style.ORANGE)
    style.name_axis(lower, "batch per GPU")
    mark_batch_changes(upper, run)
    for epoch, before, after in batch_changes(run):
        caption += f" Batch {before:g} → {after:g} at epoch {epoch:g}."
    epoch_axis(lower, run)
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
    from_zero(axes, np.array([peak / scale]))
    counted = _mark_events(axes, run, start, span, seconds)
    style.name_axis(axes, f"memory, {unit}")
    style.legend(axes)
    axes.margins(x=0.01)
    style.name_x_axis(axes, f"wall time, {time_unit}")
    caption = f"{SOURCES[run.traces[0].source]}: up to {format_bytes(peak)} in {format_duration(span)}."
    return figure, f"{caption} {counted}".rstrip()


_MARKS: dict[str, tuple[str, str, str, LineStyle]] = {
    "shift": ("shift", "green tick", style.GREEN, "solid"),
    "prune": ("removal of channels", "dash-dotted green", style.GREEN, "dashdot"),
    "batch": ("change of batch", "dashed orange", style.ORANGE, DASHED),
    "oom": ("out of memory", "red", style.RED, "solid"),
    "resume": ("resume", "dotted purple", style.PURPLE, DOTTED),
}
"""Event → its name, how its mark looks, in words and for matplotlib."""


def _mark_events(axes: Axes, run: RunData, start: float, span: float, seconds: float) -> str:
    """Marks what changes memory; returns what was marked, how often and how, for the caption."""
    marked = []
    for kind, (name, look, color, line) in _MARKS.items():
        times = [event["time"] for event in run.events if event.get("type") == kind and is_number(event.get("time"))]
        times = [time for time in times if 0 <= time - start <= span]
        for time in times:
            top = 0.05 if kind == "shift" else 1.0  # shifts are many
            axes.axvline((time - start) / seconds, ymax=top, color=color, linewidth=1.2, linestyle=line, zorder=1.5)
        if times:
            marked.append(f"{name} {len(times)}× ({look})")
    return f"Marked: {', '.join(marked)}." if marked else ""


def draw_traffic(run: RunData) -> Drawing | None:
    """Bytes that a rank exchanges in an epoch, gradients and replicas apart, and the number of gradient exchanges."""
    gradients, replicas = run.series("grad_all_reduce_bytes"), run.series("replica_sync_bytes")
    plain, count = run.series("plain_ddp_bytes"), run.series("grad_all_reduce_count")
    total = run.exchanged_bytes
    if not finite(total).size:
        return None
    figure, panels = style.new_figure((2.2, 1) if finite(count).size else (1,))
    upper = panels[0]
    scale, unit = byte_scale(np.concatenate([total, plain]))
    steps(upper, run, gradients / scale, style.BLUE, label="gradients", zorder=3)
    steps(upper, run, total / scale, style.ORANGE, base=np.nan_to_num(gradients) / scale, label="replicas")
    if finite(plain).size:
        line: dict[str, Any] = {"color": style.INK, "linewidth": 1.2, "linestyle": DASHED}
        upper.stairs(plain / scale, epoch_edges(run), baseline=None, label="plain DDP", **line)
    from_zero(upper, np.concatenate([total, plain]) / scale)
    style.name_axis(upper, f"{unit} per epoch")
    style.legend(upper)
    if len(panels) > 1:
        steps(panels[1], run, count, style.TEAL)
        style.name_axis(panels[1], "gradient all-reduces")
    epoch_axis(panels[-1], run)
    sums = [format_bytes(np.nansum(series)) for series in (gradients, replicas)]
    caption = f"Gradients {sums[0]}, replicas {sums[1]} per rank over the run"
    if run.share_of_plain_ddp is not None:
        caption += f": {format_percent(run.share_of_plain_ddp)} of what plain DDP exchanges"
    return figure, caption + "."


def draw_throughput(run: RunData) -> Drawing | None:
    """Training images per second over all ranks; dotted lines mark changes of the batch."""
    from matplotlib.ticker import StrMethodFormatter

    speed = run.series("images_per_second")
    ends = first_and_last(speed)
    if ends is None:
        return None
    figure, (axes,) = style.new_figure()
    curve(axes, run, speed, style.BLUE)
    from_zero(axes, speed)
    mark_batch_changes(axes, run)
    style.name_axis(axes, "images per second, all ranks")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    epoch_axis(axes, run)
    first, last = (format_count(end) for end in ends)
    return figure, f"{first} img/s in the first epoch, {last} in the last ({relative_change(*ends)})."
