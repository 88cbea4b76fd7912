"""Section `run` of the configuration."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Where a run leaves its files, whether it continues an earlier one, and what it shows while it runs."""

    dir: str = "runs/run"
    """Run directory: configuration, metrics, events, checkpoints and report of this run."""
    resume: str = "auto"
    """`auto` continues from the newest checkpoint of `run.dir` if there is one, `never` starts afresh and moves
    an earlier run aside, anything else is the path of the checkpoint to start from. A process that torchrun
    restarts always continues."""
    tensorboard: bool = False
    """Write TensorBoard scalars to `tensorboard/` in the run directory as well."""
    console: Literal["auto", "rich", "plain", "quiet"] = "auto"
    """Output of rank 0: `rich` (live progress), `plain` (a line per epoch), `quiet` (nothing), `auto` (rich
    on a terminal, else plain)."""
    report_every: int | None = 1
    """Refresh report.html every so many epochs (0: only at the end; null: never). A refresh that would take more than
    5 % of the time since the last one is put off to a later epoch."""

    def __post_init__(self) -> None:
        for key in ("dir", "resume"):
            if not str(getattr(self, key)).strip():
                raise ValueError(f"run.{key} must not be empty")
        if self.console not in ("auto", "rich", "plain", "quiet"):
            raise ValueError(f"run.console must be auto, rich, plain or quiet, got {self.console!r}")
        if self.report_every is not None and self.report_every < 0:
            raise ValueError(f"run.report_every must be at least 0 (or null), got {self.report_every}")


def check_run(config: RunConfig) -> None:
    """Checks that look at the machine. Raises ValueError naming the key and the remedy."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("run.tensorboard must be false without tensorboard: pip install 'locsgd-dist[tensorboard]'")
    if Path(config.dir).exists() and not Path(config.dir).is_dir():
        raise ValueError(f"run.dir must be a folder, but {config.dir} is a file")
