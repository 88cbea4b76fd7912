"""A run directory read back for drawing: series over epochs, per-layer matrices, the memory trace.

Whatever a run did not record is missing here too: a series of NaN, an empty list. Nothing raises for want of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from locsgd_dist.formatting import is_number
from locsgd_dist.recording.directory import Record, RunDirectory
from locsgd_dist.reporting.memory_trace import RankTrace, load_memory_traces

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunData:
    """Everything that a report shows of one run."""

    name: str
    config: Record
    config_text: str
    metrics: list[Record]
    """One object per completed epoch, ascending; where an epoch stands twice the later record counts."""
    events: list[Record]
    traces: list[RankTrace]

    @classmethod
    def load(cls, path: Path, *, traces: bool = True) -> RunData:
        """Reads the run directory `path`, without `traces` all but the memory trace, by far its largest file.

        Raises FileNotFoundError if it is no directory.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"no run directory at {path}")
        directory = RunDirectory(path)
        by_epoch = {m["epoch"]: m for m in directory.load_metrics() if is_number(m.get("epoch"))}
        return cls(
            name=path.resolve().name,
            config=directory.load_config(),
            config_text=_read_text(directory.config),
            metrics=[by_epoch[epoch] for epoch in sorted(by_epoch)],
            events=directory.load_events(),
            traces=load_memory_traces(directory.memory) if traces else [],
        )

    @cached_property
    def epochs(self) -> Array:
        """[E] every epoch from the first recorded one to the last."""
        if not self.metrics:
            return np.empty(0)
        return np.arange(self.metrics[0]["epoch"], self.metrics[-1]["epoch"] + 1, dtype=np.float64)

    def series(self, key: str) -> Array:
        """[E] the values of `key`; NaN where an epoch has none."""
        values = np.full(len(self.epochs), np.nan)
        for metrics in self.metrics:
            if is_number(metrics.get(key)):
                values[self._column(metrics)] = metrics[key]
        return values

    def last(self, key: str) -> Any:
        """The last recorded value of `key`, of any type; None if there is none."""
        return next((m[key] for m in reversed(self.metrics) if m.get(key) is not None), None)

    @cached_property
    def layer_names(self) -> list[str]:
        """Names of the layers in execution order, as the last epoch has them."""
        names = self.last("layer_names")
        return [str(name) for name in names] if isinstance(names, list) else []

    def layer_matrix(self, key: str) -> Array:
        """[L, E] the per-layer values of `key`; NaN where missing; no rows if never recorded."""
        columns = {self._column(m): m[key] for m in self.metrics if isinstance(m.get(key), list)}
        matrix = np.full((max(map(len, columns.values()), default=0), len(self.epochs)), np.nan)
        for column, values in columns.items():
            for layer, value in enumerate(values):
                if is_number(value):
                    matrix[layer, column] = value
        return matrix

    @cached_property
    def exchanged_bytes(self) -> Array:
        """[E] gradients and replicas together, per rank; NaN where neither was recorded."""
        parts = np.stack([self.series("grad_all_reduce_bytes"), self.series("replica_sync_bytes")])
        return np.where(np.isfinite(parts).any(axis=0), np.nansum(parts, axis=0), np.nan)

    @cached_property
    def share_of_plain_ddp(self) -> float | None:
        """Exchanged bytes over those of plain DDP, summed over the epochs that recorded both."""
        plain = self.series("plain_ddp_bytes")
        both = np.isfinite(self.exchanged_bytes) & np.isfinite(plain)
        total = plain[both].sum()
        return float(self.exchanged_bytes[both].sum() / total) if total > 0 else None

    def setting(self, section: str, key: str) -> Any:
        """`section.key` of the configuration; None where it is not set."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def _column(self, metrics: Record) -> int:
        return int(metrics["epoch"] - self.metrics[0]["epoch"])


def finite(values: Array) -> Array:
    """The values that were recorded, in order."""
    return values[np.isfinite(values)]


def first_and_last(values: Array) -> tuple[float, float] | None:
    """First and last recorded value; None if nothing was recorded."""
    recorded = finite(values)
    return (float(recorded[0]), float(recorded[-1])) if recorded.size else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
