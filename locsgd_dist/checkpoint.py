"""Checkpoints of a run: written whole or not at all, the newest readable one found again, never a pickle executed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locsgd_dist.recording import RunDirectory

log = logging.getLogger(__name__)

#: Keys that may differ between the start of a run and its continuation: where and how it runs, not what it computes.
_MAY_DIFFER = re.compile(
    r"(run|distributed|monitor|checkpoint)\..*|data\.(root|download|workers|in_memory|cache|val_batch)|train\.device"
)
_NAME = re.compile(r"epoch-(\d+)\.pt")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_epochs: int = 1
    """Epochs between checkpoints; the last epoch always leaves one; >= 1."""
    keep: int = 2
    """Newest checkpoints kept beside the best one by validation top-1; >= 1."""

    def __post_init__(self) -> None:
        for key in ("every_epochs", "keep"):
            if getattr(self, key) < 1:
                raise ValueError(f"checkpoint.{key} must be >= 1, got {getattr(self, key)}")


class CheckpointStore:
    """The ``checkpoints/`` folder of a run: ``epoch-NNNN.pt`` after NNNN epochs, and ``best.pt``."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self._keep = keep

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def paths(self) -> list[Path]:
        """Checkpoints by epoch, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), key=completed_epochs)

    def save(self, state: dict[str, Any], *, epochs: int, is_best: bool) -> Path:
        """Writes the state after ``epochs`` epochs, then removes what is too old to keep."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch-{epochs:04d}.pt"
        save_atomically(state, path)
        if is_best:
            # A hard link: the best checkpoint costs no second write and survives the removal of its epoch's name.
            temporary = self.best.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            os.link(path, temporary)
            os.replace(temporary, self.best)
        for old in self.paths()[: -self._keep]:
            old.unlink()
        return path

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read; unreadable ones are passed over with a warning."""
        for path in reversed(self.paths()):
            try:
                return path, load_state(path)
            except ValueError as error:
                log.warning("%s; trying the one before", error)
        return None


def completed_epochs(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def save_atomically(state: Any, path: Path) -> None:
    """Writes ``state`` so that ``path`` holds either what it held before or all of it, whenever the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state on the CPU; tensors and plain values only.

    Raises:
        ValueError: the file is missing, torn or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn archive surfaces as any of half a dozen types
        raise ValueError(f"checkpoint {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"checkpoint {path} is not one of this trainer: it holds no model")
    return state


def was_restarted() -> bool:
    """Whether torchrun has started this process anew after a failure: the run then goes on, whatever ``run.resume``."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_resume(run_dir: Path, resume: str, epochs: int, config: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that ``run.resume`` can be done, from what the run directory says of itself.

    Args:
        config: the configuration as nested mappings, compared with the one that the directory holds.

    Raises:
        ValueError: the run is finished, was started with another configuration, or the named checkpoint is missing.
    """
    if resume not in ("auto", "never"):
        load_state(Path(resume))
    if resume != "auto" and not was_restarted():
        return
    paths = CheckpointStore(run_dir / "checkpoints").paths()
    if not paths:
        return
    saved = RunDirectory(run_dir).load_config()
    changed = [key for key in changed_keys(saved, config) if not _MAY_DIFFER.fullmatch(key)]
    if saved and changed:
        raise ValueError(
            f"run.dir: {run_dir} holds a run with another configuration ({', '.join(changed[:5])}); "
            "choose another run.dir, or run.resume=never to move that run aside"
        )
    if completed_epochs(paths[-1]) >= epochs:
        raise ValueError(
            f"run.dir: {run_dir} holds a finished run of {epochs} epochs; "
            "choose another run.dir, or run.resume=never to move it aside and start afresh"
        )


def changed_keys(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Dotted keys in which two configurations, as nested mappings, differ."""
    return [
        f"{section}.{key}"
        for section in sorted({*a, *b})
        for key in sorted({*a.get(section, {}), *b.get(section, {})})
        if a.get(section, {}).get(key) != b.get(section, {}).get(key)
    ]
