"""What rank 0 shows while it trains: live progress on a terminal, a line per epoch in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from locsgd_dist.formatting import (
    MISSING,
    describe_event,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
)
from locsgd_dist.recording.sinks import Sink

ConsoleMode = Literal["auto", "rich", "plain", "quiet"]

_SHOWN_EVENTS = {
    "shift": "green",
    "prune": "green",
    "frozen_layers": "yellow",
    "outputs": "cyan",
    "batch": "cyan",
    "oom": "bold red",
    "resume": "yellow",
    "preempt": "yellow",
    "bad_step": "yellow",
    "collapse": "bold red",
    "warning": "yellow",
}
"""Checkpoints are on record in events.jsonl; a line for each would only push the epochs off the screen."""


def epoch_cells(metrics: Mapping[str, Any], num_epochs: int | None = None) -> list[tuple[str, str, int]]:
    """(heading, text, column width) of an epoch's line, the most important first."""

    def number(key: str, pattern: str) -> str:
        value = metrics.get(key)
        return MISSING if value is None else format(value, pattern)

    batch = f"{metrics.get('world_size', MISSING)}×{metrics.get('per_gpu_batch', MISSING)}"
    exchanged = [metrics.get(key) for key in ("grad_all_reduce_bytes", "replica_sync_bytes")]
    counted = [value for value in exchanged if value is not None]
    return [
        ("epoch", _ordinal(metrics["epoch"], num_epochs), 7),
        ("boundary", f"{metrics.get('boundary', MISSING)}/{metrics.get('num_layers', MISSING)}", 8),
        ("batch", batch, 7),
        ("loss", number("train_loss", ".4f"), 7),
        ("val top-1", format_percent(metrics.get("val_top1")), 9),
        ("img/s", format_count(metrics.get("images_per_second")), 9),
        ("footprint", format_bytes(metrics.get("footprint_bytes")), 9),
        ("exchanged", format_bytes(sum(counted) if counted else None), 9),
        ("time", format_duration(metrics.get("seconds")), 12),
    ]


class PlainConsole(Sink):
    """One self-explaining line per epoch and event, for log files and pipes."""

    STEP_INTERVAL = 30.0
    """Seconds between progress lines inside an epoch."""

    def __init__(self, num_epochs: int | None = None, file: TextIO | None = None) -> None:
        self._num_epochs = num_epochs
        self._file = file
        self._next_step = time.monotonic() + self.STEP_INTERVAL

    @property
    def step_due(self) -> bool:
        return time.monotonic() >= self._next_step

    def step(self, *, epoch: int, fraction: float, loss: float | None, images_per_second: float) -> None:
        self._next_step = time.monotonic() + self.STEP_INTERVAL
        done = _progress_text(fraction, loss, images_per_second)
        self._print(f"epoch {_ordinal(epoch, self._num_epochs)}  {done}")

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        self._next_step = time.monotonic() + self.STEP_INTERVAL
        cells = epoch_cells(metrics, self._num_epochs)
        self._print("  ".join(f"{heading} {text}" for heading, text, _ in cells))

    def event(self, event: Mapping[str, Any]) -> None:
        if event["type"] in _SHOWN_EVENTS:
            self._print(f"{event['type']}: {describe_event(event)}")

    def _print(self, line: str) -> None:
        print(line, file=self._file or sys.stdout, flush=True)


class RichConsole(Sink):
    """A table that grows by a row an epoch, with a progress bar below it."""

    STEP_INTERVAL = 0.1

    def __init__(self, num_epochs: int | None = None, console: Console | None = None) -> None:
        self._num_epochs = num_epochs
        self._console = console or Console(highlight=False)
        self._next_step = 0.0
        self._header_shown = False
        self._progress: Progress | None = None
        self._task = TaskID(0)

    @property
    def step_due(self) -> bool:
        return time.monotonic() >= self._next_step

    def step(self, *, epoch: int, fraction: float, loss: float | None, images_per_second: float) -> None:
        self._next_step = time.monotonic() + self.STEP_INTERVAL
        if self._progress is None:
            columns = (
                TextColumn("[dim]{task.description}"),
                BarColumn(24),
                TextColumn("[dim]{task.fields[state]}"),
            )
            self._progress = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._task = self._progress.add_task("", total=1.0, state="")
            self._progress.start()
        name = f"epoch {_ordinal(epoch, self._num_epochs)}"
        state = _progress_text(fraction, loss, images_per_second)
        self._progress.update(self._task, completed=fraction, description=name, state=state)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        cells = epoch_cells(metrics, self._num_epochs)
        if not self._header_shown:
            self._console.print(self._row([(heading, heading, width) for heading, _, width in cells], style="bold"))
            self._header_shown = True
        self._console.print(self._row(cells))

    def event(self, event: Mapping[str, Any]) -> None:
        style = _SHOWN_EVENTS.get(event["type"])
        if style is not None:
            self._console.print(Text(f"{event['type']}: {describe_event(event)}", style=style))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _row(self, cells: list[tuple[str, str, int]], style: str = "") -> Text:
        """As many cells as the terminal is wide, so that a row never wraps."""
        row = Text(style=style, no_wrap=True, overflow="ellipsis")
        for _, text, width in cells:
            if row.cell_len + width + 2 > self._console.width:
                break
            row.append(text.rjust(width) + "  ")
        return row


def _ordinal(epoch: int, num_epochs: int | None) -> str:
    """People count from one: epoch 0 of 12 is `1/12`."""
    return f"{epoch + 1}/{num_epochs}" if num_epochs else str(epoch + 1)


def _progress_text(fraction: float, loss: float | None, images_per_second: float) -> str:
    parts = [f"{100 * fraction:3.0f} %", f"{format_count(images_per_second)} img/s"]
    return "  ".join(parts if loss is None else [*parts, f"loss {loss:.4f}"])


def open_console(mode: ConsoleMode, num_epochs: int | None = None) -> Sink:
    """The console for `mode`; `auto` is rich only on a terminal that can move its cursor."""
    if mode == "quiet":
        return Sink()
    if mode == "auto":
        mode = "rich" if sys.stdout.isatty() and not Console().is_dumb_terminal else "plain"
    return RichConsole(num_epochs) if mode == "rich" else PlainConsole(num_epochs)
