"""The plan in the terminal, and as figures in the report's style."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from locsgd_dist.formatting import format_bytes, format_count, format_duration
from locsgd_dist.planner.plan import NOT_ESTIMATED, Planner
from locsgd_dist.planner.schedule import PlannedEpoch
from locsgd_dist.planner.timeline import MemoryParts
from locsgd_dist.reporting import style
from locsgd_dist.reporting.drawing import Drawing, byte_scale, from_zero
from locsgd_dist.reporting.learning_figures import draw_boundary
from locsgd_dist.reporting.resource_figures import draw_footprint, draw_throughput, draw_traffic
from locsgd_dist.reporting.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def print_plan(planner: Planner, console: Console) -> None:
    """Tables of memory by boundary, of the run by phases and of scaling; then what they rest on."""
    console.print(_boundary_table(planner), _phase_table(planner))
    if planner.can_time:
        console.print(_scaling_table(planner))
    memory = planner.machine.memory_bytes
    if memory is not None and (worst := max(epoch.footprint for epoch in planner.epochs)) > memory:
        console.print(f"[bold]Does not fit:[/] {format_bytes(worst)} are needed, {format_bytes(memory)} are there.")
    console.print("Assumed:", *(f"- {sentence}" for sentence in planner.assumptions()), sep="\n")
    console.print("Not estimated:", *(f"- {what}" for what in NOT_ESTIMATED), sep="\n")


def _boundary_table(planner: Planner) -> Table:
    config, machine = planner.config, planner.machine
    visited = {epoch.boundary for epoch in planner.epochs} | {0, len(planner.steps) - 1}
    table = Table(
        title=f"{config.model.name}, {planner.data.shape.image_size} px, batch {config.batch.per_gpu} per GPU, "
        f"{config.train.precision}: memory by boundary (of {len(planner.layers)} layers)",
        caption=f"Boundaries of this run; --json has all {len(planner.steps)}.",
    )
    headings = (
        "boundary",
        "footprint",
        "of first",
        *MemoryParts.__dataclass_fields__,
        "largest batch",
        "gradients sent",
    )
    for heading in headings:
        table.add_column(heading.replace("_", " "), justify="right")
    first = planner.footprint(0, config.batch.per_gpu)
    for step in planner.steps:
        if step.boundary not in visited:
            continue
        parts = step.memory.at(config.batch.per_gpu)
        table.add_row(
            str(step.boundary),
            format_bytes(parts.total),
            f"{100 * parts.total / first:.0f} %",
            *(format_bytes(value) for value in asdict(parts).values()),
            format_count(None if machine.memory_bytes is None else step.memory.largest_batch(machine.memory_bytes)),
            format_bytes(step.gradient_bytes if machine.gpus > 1 else 0),
        )
    return table


def _phases(planner: Planner) -> Iterator[list[PlannedEpoch]]:
    """Consecutive epochs with the same boundary and batch."""
    for _, epochs in groupby(planner.epochs, key=lambda epoch: (epoch.boundary, epoch.per_gpu)):
        yield list(epochs)


def _phase_table(planner: Planner) -> Table:
    table = Table(
        title=f"The run on {planner.machine.gpus} GPU{'s' * (planner.machine.gpus > 1)}, "
        f"pace {planner.pace}, batch.policy {planner.batch.policy}"
    )
    headings = ["epochs", "boundary", "batch per GPU", "footprint", "steps", "gradients", "replicas", "plain DDP"]
    for heading in headings + (["epoch takes"] if planner.can_time else []):
        table.add_column(heading, justify="right")
    totals = np.zeros(4)
    for epochs in _phases(planner):
        boundary, per_gpu = epochs[0].boundary, epochs[0].per_gpu
        traffic = planner.traffic(boundary, per_gpu)
        seconds = planner.seconds(boundary, per_gpu) if planner.can_time else 0.0
        sent = (traffic.gradient_bytes, traffic.replica_bytes, planner.plain_bytes())
        totals += len(epochs) * np.array([*sent, seconds])
        table.add_row(
            f"{epochs[0].epoch}–{epochs[-1].epoch}" if len(epochs) > 1 else str(epochs[0].epoch),
            *(str(boundary), str(per_gpu), format_bytes(epochs[0].footprint), format_count(traffic.steps)),
            *(format_bytes(value) for value in sent),
            *([format_duration(seconds)] if planner.can_time else []),
        )
    table.add_section()
    table.add_row(
        *("whole run", "", "", "", ""),
        *(format_bytes(value) for value in totals[:3]),
        *([format_duration(totals[3])] if planner.can_time else []),
    )
    return table


def _scaling_table(planner: Planner) -> Table:
    table = Table(title="Training time of the whole run, and how it scales")
    for heading in ("GPUs", "global batch", "run", "efficiency", "plain DDP", "efficiency", "speed-up"):
        table.add_column(heading, justify="right")
    for point in planner.scaling():
        table.add_row(
            *(format_count(point.gpus), format_count(point.global_batch)),
            *(format_duration(point.seconds), f"{100 * point.efficiency:.0f} %"),
            *(format_duration(point.plain_seconds), f"{100 * point.plain_efficiency:.0f} %"),
            f"{point.speed_up:.2f}×",
        )
    return table


def write_plots(planner: Planner, folder: Path) -> list[Path]:
    """Writes the figures as PNGs into an existing folder and returns their paths.

    Those of a run's report that speak of memory, batch, boundary, traffic and speed, and two of the planner's own.
    """
    run = RunData(
        name=planner.config.model.name,
        config={"selection": asdict(planner.config.selection)},
        config_text="",
        metrics=[planner.epoch_record(epoch) for epoch in planner.epochs],
        events=[],
        traces=[],
    )
    written: list[Path] = []
    with style.house_style():
        figures: dict[str, tuple[str, Drawing | None]] = {
            "memory-by-boundary": ("Memory by boundary", draw_memory(planner)),
            "footprint": ("Footprint and batch", draw_footprint(run)),
            "boundary": ("Boundary", draw_boundary(run)),
            "traffic": ("Bytes exchanged", draw_traffic(run) if planner.machine.gpus > 1 else None),
            "throughput": ("Throughput", draw_throughput(run) if planner.can_time else None),
            "scaling": ("Scaling", draw_scaling(planner) if planner.can_time and planner.machine.gpus > 1 else None),
        }
        for key, (title, drawing) in figures.items():
            if drawing is not None:
                written.append(folder / f"{key}.png")
                style.to_png(drawing[0], written[-1], f"{title} · plan of {run.name}")
    return written


def draw_memory(planner: Planner) -> Drawing:
    """What a step holds at each boundary, by use, and the largest batch where the GPU's memory is known."""
    memory = planner.machine.memory_bytes
    figure, panels = style.new_figure((2.2, 1) if memory is not None else (1,))
    boundaries = [step.boundary for step in planner.steps]
    parts = [step.memory.at(planner.config.batch.per_gpu) for step in planner.steps]
    scale, unit = byte_scale(np.array([part.total for part in parts]))
    stack = {
        "weights and their state": ([p.parameters + p.gradients + p.optimizer_state for p in parts], style.TEAL),
        "activations": ([p.activations for p in parts], style.BLUE),
        "temporary": ([p.temporary for p in parts], style.ORANGE),
    }
    edges = np.arange(len(boundaries) + 1) - 0.5
    base = np.zeros(len(boundaries))
    for label, (values, color) in stack.items():
        top = base + np.array(values) / scale
        panels[0].stairs(top, edges, baseline=base, fill=True, color=color, linewidth=0, label=label)
        base = top
    from_zero(panels[0], base)
    style.name_axis(panels[0], unit)
    style.legend(panels[0])
    if memory is not None:
        batches = np.array([step.memory.largest_batch(memory) for step in planner.steps], dtype=np.float64)
        panels[1].stairs(batches, edges, baseline=None, color=style.ORANGE, linewidth=1.8)
        from_zero(panels[1], batches)
        style.name_axis(panels[1], f"largest batch per GPU in {format_bytes(memory)}")
    panels[-1].set_xlim(edges[0], edges[-1])
    style.name_x_axis(panels[-1], "boundary")
    return figure, f"A step on {planner.config.batch.per_gpu} images at each boundary."


def draw_scaling(planner: Planner) -> Drawing:
    """Speed over SGD on one GPU, against the number of GPUs."""
    points = planner.scaling()
    figure, (axes,) = style.new_figure()
    gpus = [point.gpus for point in points]
    one = points[0].plain_seconds
    curves = {
        "LoCal+SGD": ([one / point.seconds for point in points], style.BLUE),
        "plain DDP": ([one / point.plain_seconds for point in points], style.MUTED),
    }
    for label, (speed, color) in curves.items():
        axes.plot(gpus, speed, color=color, marker="o", markersize=3.5, label=label)
    axes.plot(gpus, gpus, color=style.GRID, linewidth=1.2, zorder=1, label="linear")
    _doubling_axes(axes, gpus)
    style.name_axis(axes, "speed-up")
    style.legend(axes)
    style.name_x_axis(axes, "GPUs")
    return figure, f"{points[-1].speed_up:.2f}× plain DDP on {points[-1].gpus} GPUs."


def _doubling_axes(axes: Axes, gpus: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(gpus[:: -(-len(gpus) // 7)]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
