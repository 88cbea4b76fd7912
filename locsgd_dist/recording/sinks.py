"""What a recorder writes to, apart from the console: JSON lines, TensorBoard, the report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locsgd_dist.formatting import is_number
from locsgd_dist.recording.directory import JsonLines, Record, RunDirectory

logger = logging.getLogger(__name__)

INCIDENTS = frozenset({"oom", "preempt", "resume", "outputs"})
"""Events of one process and of wall-clock time: they stay on record when a run resumes."""
AFTER_EPOCH = frozenset({"shift", "frozen_layers", "collapse", "batch", "prune"})
"""Events that follow an epoch's record: a run that resumes behind the epoch's last sample, but before that record,
repeats them. (A shift before the first sample belongs to no epoch.)"""


class Sink:
    """What a recorder can write to. Every method may be left as it is: a sink takes what concerns it."""

    @property
    def step_due(self) -> bool:
        """Whether a `step` now would be shown."""
        return False

    def epoch(self, metrics: Record) -> None:
        """Takes the numbers of a completed epoch."""

    def event(self, event: Record) -> None:
        """Takes one event."""

    def step(self, *, epoch: int, fraction: float, loss: float | None, images_per_second: float) -> None:
        """Takes the progress inside an epoch."""

    def truncate_to(self, epoch: int, samples_seen: int | None) -> None:
        """Forgets what came after `epoch`."""

    def close(self) -> None:
        """Releases files and threads."""


class JsonlSink(Sink):
    """metrics.jsonl and events.jsonl."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._metrics = JsonLines(directory.metrics)
        self._events = JsonLines(directory.events)

    def epoch(self, metrics: Record) -> None:
        self._metrics.append(metrics)

    def event(self, event: Record) -> None:
        self._events.append(event)

    def truncate_to(self, epoch: int, samples_seen: int | None) -> None:
        kept = [record for record in self._directory.load_metrics() if record.get("epoch", epoch) <= epoch]
        if samples_seen is None:
            samples_seen = max((record.get("samples_seen", 0) for record in kept), default=0)
        self._metrics.keep(kept)
        self._events.keep(
            event
            for event in self._directory.load_events()
            if event.get("type") in INCIDENTS
            or (event.get("samples_seen", 0) <= samples_seen and not self._is_repeated(event, epoch, samples_seen))
        )

    @staticmethod
    def _is_repeated(event: Record, epoch: int, samples_seen: int) -> bool:
        is_here = event.get("epoch", 0) > epoch and event.get("samples_seen", 0) == samples_seen > 0
        return is_here and event.get("type") in AFTER_EPOCH

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


class TensorBoardSink(Sink):
    """Scalars over epochs; the first epoch opens the writer, when it is known what a resumed run repeats."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None
        self._purge_step: int | None = None

    def epoch(self, metrics: Record) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=self._purge_step)
        epoch = metrics["epoch"]
        for tag, value in tensorboard_scalars(metrics).items():
            self._writer.add_scalar(tag, value, global_step=epoch)
        self._writer.flush()

    def truncate_to(self, epoch: int, samples_seen: int | None) -> None:
        self.close()
        self._purge_step = epoch + 1  # TensorBoard drops what earlier files hold from this step on

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


_TENSORBOARD_GROUPS = (
    ("train_", "train/"),
    ("val_", "val/"),
    ("ema_val_", "val/ema_"),
    ("footprint", "memory/footprint"),
    ("grad_", "traffic/grad_"),
    ("replica_", "traffic/replica_"),
    ("plain_ddp_", "traffic/plain_ddp_"),
)


def tensorboard_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Tag → value of an epoch's numbers in TensorBoard's groups; one tag a layer for `layer_*` lists."""
    scalars: dict[str, float] = {}
    names = metrics.get("layer_names") or []
    for key, value in metrics.items():
        if key.startswith("layer_") and key != "layer_names" and isinstance(value, list):
            scalars.update({f"{key}/{name}": item for name, item in zip(names, value, strict=False) if is_number(item)})
        elif is_number(value) and key != "epoch":
            group = next((pair for pair in _TENSORBOARD_GROUPS if key.startswith(pair[0])), ("", "run/"))
            scalars[group[1] + key.removeprefix(group[0])] = value
    return scalars


class ReportSink(Sink):
    """Refreshes report.html while training goes on, and writes it a last time at the end."""

    MAX_SHARE = 0.05

    def __init__(self, directory: RunDirectory, every: int) -> None:
        self._directory = directory
        self._every = every
        self._epochs = 0
        self._cost = 0.0
        self._written = -math.inf

    def epoch(self, metrics: Record) -> None:
        self._epochs += 1
        # the other ranks wait meanwhile, so that short epochs must not spend their time on drawing
        affordable = self._cost <= self.MAX_SHARE * (time.monotonic() - self._written)
        if self._every and self._epochs % self._every == 0 and affordable:
            self._write(plots=False)

    def close(self) -> None:
        if self._epochs:
            self._write(plots=True)

    def _write(self, *, plots: bool) -> None:
        from locsgd_dist.reporting import write_report  # matplotlib: not before the first report

        start = time.monotonic()
        try:
            write_report(self._directory.path, plots=plots)
        except Exception:  # a report can be written again from the files; the training cannot
            logger.warning("report.html could not be written", exc_info=True)
        self._written = time.monotonic()
        self._cost = self._written - start
