"""When a run may go on, and from which file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locsgd_dist.checkpoint.file import load_state
from locsgd_dist.checkpoint.store import CheckpointStore, position_of
from locsgd_dist.recording import RunDirectory

#: Keys that may differ between the start of a run and its continuation: where and how it runs, not what it computes.
_MAY_DIFFER = re.compile(
    r"(run|monitor|checkpoint|faults|elastic)\..*|distributed\.(backend|timeout_minutes|bucket_mib)"
    r"|data\.(root|download|workers|in_memory|cache|val_batch)|train\.device|localized\.keep_(outputs|gib)"
)


def was_restarted() -> bool:
    """Whether torchrun has started this process anew after a failure: the run then goes on, whatever ``run.resume``."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_resume(
    run_dir: Path,
    resume: str,
    epochs: int,
    config: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Checks that ``run.resume`` can be done, from what the run directory says of itself.

    Args:
        config: the configuration as nested mappings, compared with the one that the directory holds.
        defaults: values of keys that the directory's does not hold: they are younger than the run.

    Raises:
        ValueError: the run is finished, was started with another configuration, or the named checkpoint is missing
            or of a run's end.
    """
    if resume not in ("auto", "never"):
        try:
            progress = load_state(Path(resume)).get("progress", {})
        except ValueError as error:
            raise ValueError(f"run.resume: {error}") from None
        if progress.get("epoch", 0) >= epochs and not was_restarted():
            raise ValueError(
                f"run.resume: checkpoint {resume} was taken after {progress['epoch']} epochs: nothing is left of "
                f"train.epochs={epochs}"
            )
    if resume != "auto" and not was_restarted():
        return
    paths = CheckpointStore(run_dir / "checkpoints").paths()
    if not paths:
        return
    saved = RunDirectory(run_dir).load_config()
    defaults = defaults or {}
    complete = {section: {**defaults.get(section, {}), **saved.get(section, {})} for section in {*defaults, *saved}}
    changed = differing_keys(complete, config)
    if saved and changed:
        raise ValueError(
            f"run.dir: {run_dir} holds a run with another configuration ({', '.join(changed[:5])}); "
            "choose another run.dir, or run.resume=never to move that run aside"
        )
    # A rank that dies behind the last checkpoint has torchrun start all anew: they only have the end left to do.
    if position_of(paths[-1]).epochs >= epochs and not was_restarted():
        raise ValueError(
            f"run.dir: {run_dir} holds a finished run of {epochs} epochs; "
            "choose another run.dir, or run.resume=never to move it aside and start afresh"
        )


def checkpointed_epochs(run_dir: Path) -> int:
    """Epochs that the newest checkpoint of a run holds whole; 0 where there is none."""
    paths = CheckpointStore(run_dir / "checkpoints").paths()
    return position_of(paths[-1]).epochs if paths else 0


def differing_keys(saved: Mapping[str, Mapping[str, Any]], config: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Dotted keys whose values make another run of it: those of :func:`changed_keys` that decide what is computed."""
    return [key for key in changed_keys(saved, config) if not _MAY_DIFFER.fullmatch(key)]


def changed_keys(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Dotted keys in which two configurations, as nested mappings, differ."""
    return [
        f"{section}.{key}"
        for section in sorted({*a, *b})
        for key in sorted({*a.get(section, {}), *b.get(section, {})})
        if a.get(section, {}).get(key) != b.get(section, {}).get(key)
    ]
