"""Run directories found, read and judged: what may enter a comparison, and why the rest may not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from locsgd_dist.config import Config, ConfigError, load_config
from locsgd_dist.formatting import is_number
from locsgd_dist.reporting.comparison.traits import Traits
from locsgd_dist.reporting.run_data import Array, RunData

_SEED_FOLDER = re.compile(r"seed-\d+")
_MOVED_ASIDE = re.compile(r".+\.old-\d+")


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        name: ``VARIANT/seed-S`` in a sweep's layout, else the folder's name.
        folder: the variant's folder in a sweep's layout; None for a directory that stands alone.
        baseline: name of the folder that the sweep takes as this run's baseline; None where nothing says so.
    """

    name: str
    path: Path
    folder: Path | None
    config: Config
    data: RunData
    baseline: str | None = None

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @cached_property
    def traits(self) -> Traits:
        return Traits.of(self.config, int(self.data.metrics[0].get("world_size") or 1))

    @cached_property
    def top1(self) -> Array:
        """[E] validation accuracy; NaN in epochs without an evaluation."""
        return self.data.series("val_top1")

    def cumulative(self, key: str) -> Array:
        """[E] sum of ``key`` up to and with each epoch; all NaN where an epoch lacks it."""
        return np.cumsum(self.data.series(key))

    @cached_property
    def images(self) -> Array:
        """[E] training images of each epoch."""
        return np.diff(self.data.series("samples_seen"), prepend=0.0)


@dataclass(frozen=True)
class LeftOut:
    """A run directory that does not enter the comparison, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} is left out: {self.reason}"


def find_run_directories(paths: Sequence[Path]) -> list[Path]:
    """The run directories among and below ``paths``, each once, in the order of the paths and then by name.

    A folder with config.yaml or metrics.jsonl is one (a run that has just started has no metrics yet).

    Raises:
        ValueError: a path does not exist or holds no run directory.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory: compare takes run or sweep directories")
        below = sorted(file.parent for file in path.rglob("config.yaml") if _is_run_directory(file.parent))
        if not below:
            raise ValueError(f"{path} is not a run directory and holds none (config.yaml beside metrics.jsonl)")
        found.update((directory.resolve(), None) for directory in below)
    return list(found)


def _is_run_directory(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("metrics.jsonl", "events.jsonl", "memory.csv", "checkpoints"))


def load_runs(directories: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Reads the directories; those that cannot be compared are returned with the reason."""
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for path in directories:
        try:
            runs.append(load_run(path))
        except ValueError as error:
            left_out.append(LeftOut(path, str(error)))
    return runs, left_out


def load_run(path: Path) -> Run:
    """One finished run.

    Raises:
        ValueError: it was moved aside, its configuration cannot be read, it is unfinished or its record has gaps.
    """
    if _MOVED_ASIDE.fullmatch(path.name):
        raise ValueError("a later start of the run moved it aside")
    try:
        config = load_config(path / "config.yaml")
    except ConfigError as error:
        raise ValueError(f"its config.yaml cannot be read by this version ({error})") from None
    data = RunData.load(path, traces=False)
    recorded = {metrics["epoch"] for metrics in data.metrics}
    epochs = config.train.epochs
    if not recorded or max(recorded) < epochs - 1:
        raise ValueError(f"unfinished, {len(recorded)} of {epochs} epochs are recorded")
    if missing := sorted(set(range(epochs)) - recorded):
        raise ValueError(f"its metrics.jsonl lacks epoch {', '.join(map(str, missing[:5]))}")
    if not is_number(data.metrics[-1].get("val_top1")):
        raise ValueError("its last epoch has no validation accuracy")
    in_sweep = _SEED_FOLDER.fullmatch(path.name) is not None
    return Run(
        name=f"{path.parent.name}/{path.name}" if in_sweep else path.name,
        path=path,
        folder=path.parent if in_sweep else None,
        config=config,
        data=data,
        baseline=_baseline_of(path.parent) if in_sweep else None,
    )


def _baseline_of(folder: Path) -> str | None:
    """What the sweep's ``sweep.json`` says of a variant's folder."""
    try:
        manifest = json.loads((folder.parent / "sweep.json").read_text(encoding="utf-8"))
        entry = next(v for v in manifest["variants"] if v["name"] == folder.name)
        return entry["baseline"] if isinstance(entry["baseline"], str) else None
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None  # no sweep of `locsgd sweep`: the baseline is found from the configurations
