"""The checkpoints of a run: their names, which are kept, which is the newest that can be read."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locsgd_dist.checkpoint.file import load_state, save_atomically

log = logging.getLogger(__name__)

_NAME = re.compile(r"epoch-(\d+)(?:-sample-(\d+))?\.pt")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_epochs: int = 1
    """Epochs between checkpoints; the last epoch always leaves one; >= 1."""
    every_steps: int | None = None
    """Steps between checkpoints inside epochs (null: none); >= 1."""
    every_minutes: float | None = None
    """Minutes between checkpoints inside epochs (null: none); > 0."""
    keep: int = 2
    """Newest checkpoints kept beside the best one by validation top-1; >= 1."""

    def __post_init__(self) -> None:
        for key in ("every_epochs", "keep"):
            if getattr(self, key) < 1:
                raise ValueError(f"checkpoint.{key} must be >= 1, got {getattr(self, key)}")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"checkpoint.every_steps must be >= 1 (or null), got {self.every_steps}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes must be > 0 (or null), got {self.every_minutes}")


@dataclass(frozen=True, order=True)
class Position:
    """Where in a run a checkpoint was taken: ``epochs`` completed, then ``samples`` into the next one."""

    epochs: int
    samples: int = 0

    @property
    def file_name(self) -> str:
        inside = f"-sample-{self.samples:09d}" if self.samples else ""
        return f"epoch-{self.epochs:04d}{inside}.pt"


@dataclass(frozen=True)
class Written:
    """The outcome of a save: ``error`` says what went wrong; the file may stand all the same."""

    path: Path
    position: Position
    error: str | None = None
    is_saved: bool = True


class CheckpointStore:
    """The ``checkpoints/`` folder of a run.

    ``epoch-NNNN.pt`` after NNNN epochs, ``epoch-NNNN-sample-S.pt`` S samples later, and ``best.pt``.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self._keep = keep
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[Written] | None = None

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def paths(self) -> list[Path]:
        """Checkpoints in the order of their positions. A link that leads out of the folder is none."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and self._is_inside(path)]
        return sorted(found, key=position_of)

    def save(self, state: dict[str, Any], position: Position, *, is_best: bool = False) -> Path:
        """Writes a state, then removes what is too old to keep.

        Raises:
            OSError: it could not be written; all earlier ones are still there.
        """
        path = self._write(state, position)
        self._tidy(path, is_best)
        return path

    def _write(self, state: dict[str, Any], position: Position) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        path = self.folder / position.file_name
        save_atomically(state, path)
        return path

    def _tidy(self, path: Path, is_best: bool) -> None:
        if is_best:
            # A hard link: the best checkpoint costs no second write and survives the removal of its epoch's name.
            temporary = self.best.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:  # a file system without such links
                shutil.copyfile(path, temporary)
            os.replace(temporary, self.best)
        for old in self.paths()[: -self._keep]:
            old.unlink()

    def start_saving(self, state: dict[str, Any], position: Position, *, is_best: bool = False) -> None:
        """Saves in a thread; ``state`` must not change any more. Wait for an earlier save first."""
        assert self._writing is None, "one at a time: wait() first"
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._thread.submit(self._outcome_of_saving, state, position, is_best)

    def finished(self) -> Written | None:
        """What the save under way came to, once it is over; None before that, and when none was started."""
        return self.wait() if self._writing is not None and self._writing.done() else None

    def wait(self) -> Written | None:
        """Waits for the save under way, if any, and returns what it came to."""
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def close(self) -> None:
        """Finishes the save under way; safe to call twice."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read; unreadable ones are passed over with a warning."""
        for path in reversed(self.paths()):
            try:
                return path, load_state(path)
            except ValueError as error:
                log.warning("%s; trying the one before", error)
        return None

    def go_on_from(self, source: Path, position: Position) -> None:
        """Makes ``source``, which was taken at ``position``, the newest checkpoint of the folder.

        A file from elsewhere gets its numbered name here too, so that a process that is killed before it has saved is
        followed by one that goes on from the same place. Checkpoints behind it are renamed (``NAME.old``, then
        ``NAME.old-2``, ...): they would count as the newest, and push out those that the run is going to write.

        Raises:
            ValueError: the file cannot be kept here; nothing has been renamed.
        """
        home = self.folder / position.file_name
        if not (home.exists() and home.samefile(source)):
            # The copy stands before anything is renamed: killed in between, the next start finds what was there.
            temporary = self._copied(source, home)
            if home.exists():
                home.replace(_unused(home.with_name(f"{home.name}.old")))
            os.replace(temporary, home)
        for path in self.paths():
            if position_of(path) > position:
                path.replace(_unused(path.with_name(f"{path.name}.old")))

    def keep_best_of(self, top1: float) -> bool:
        """Whether ``best.pt`` has that validation top-1. If not, it is of epochs that the run has turned its back on,
        and is renamed like those of :meth:`go_on_from`."""
        if not self.best.exists():
            return False
        with suppress(ValueError, KeyError):
            if load_state(self.best)["progress"]["best_top1"] == top1:
                return True
        self.best.replace(_unused(self.best.with_name(f"{self.best.name}.old")))
        return False

    def _copied(self, source: Path, home: Path) -> Path:
        temporary = home.with_name(f".{home.name}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:  # on another file system
                with source.open("rb") as original, temporary.open("wb") as copy:
                    shutil.copyfileobj(original, copy)
                    copy.flush()
                    os.fsync(copy.fileno())
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = error.strerror or error
            raise ValueError(f"run.resume: checkpoint {source} cannot be kept in {self.folder}: {reason}") from None
        return temporary

    def _outcome_of_saving(self, state: dict[str, Any], position: Position, is_best: bool) -> Written:
        path = self.folder / position.file_name
        is_saved = False
        try:
            self._write(state, position)
            is_saved = True
            self._tidy(path, is_best)
        except OSError as error:  # a full disk: the run goes on, and what was saved before is kept
            return Written(path, position, f"{error.strerror or error}", is_saved)
        return Written(path, position)

    def _is_inside(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()


def _unused(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    numbers = itertools.count(2)
    found = path
    while found.exists():
        found = path.with_name(f"{path.name}-{next(numbers)}")
    return found


def position_of(path: Path) -> Position:
    """Where in the run a checkpoint of that name was taken."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return Position(int(match[1]), int(match[2] or 0))


def completed_epochs(path: Path) -> int:
    """Epochs that were over when a checkpoint of that name was taken."""
    return position_of(path).epochs
