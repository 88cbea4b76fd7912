"""When a run is saved, and from what it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from signal import Signals
from typing import Any

from locsgd_dist.checkpoint import CheckpointConfig, CheckpointStore, Position, Written, load_state
from locsgd_dist.distributed import DelayedMax, Runtime
from locsgd_dist.faults import Preempted, StopSignals, clear_marker, write_marker
from locsgd_dist.recording import Recorder, RunDirectory
from locsgd_dist.run_state import FORMAT, RunState

# What a rank asks of all: to save, or, in numbers above it, to leave because of a signal.
_NOTHING, _SAVE = 0, 1
_PAUSE_SECONDS = 10.0


class NotSavedError(Exception):
    """The run has come to its end, but its last checkpoint could not be written."""


class Checkpointer:
    """Saves a run where it is due or asked for, and leaves when the machine is about to be taken away.

    All ranks call every method at the same time. Rank 0 writes, in a thread, while training goes on; what goes wrong
    there is recorded and costs the run nothing but that checkpoint.

    Args:
        signals: of this rank; ranks agree on what they ask for.
        is_restart: torchrun has started the run again: it goes on from its newest checkpoint, whatever
            ``run.resume`` said at its first start. The same on all ranks.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        state: RunState,
        *,
        directory: RunDirectory,
        recorder: Recorder,
        signals: StopSignals,
        is_restart: bool,
    ):
        self.store = CheckpointStore(directory.checkpoints, config.keep)
        self._config = config
        self._state = state
        self._runtime: Runtime = state.runtime
        self._progress = state.progress
        self._directory = directory
        self._recorder = recorder
        self._signals = signals
        self._is_restart = is_restart
        self._agreed = DelayedMax(self._runtime)
        self._last_save = time.monotonic()
        self._has_asked = False
        self._owes_save = False
        self._saving = (0, 0)
        self._is_best = False
        self._lost: str | None = None

    def restore(self, resume: str) -> bool:
        """Goes on from the checkpoint that ``run.resume`` means, if there is one.

        Raises:
            ValueError: it cannot be read (of several, none can), another version has written it, or it is of a run
                that is not this one.
        """
        found = self._find(resume)
        if found is None:
            return False
        path, state = found
        if state.get("format") != FORMAT:
            raise ValueError(f"run.resume: checkpoint {path} was written by another version of this trainer")
        try:
            self._state.restore(state)
        except (KeyError, RuntimeError, ValueError) as error:
            if resume == "auto":
                raise
            # The file may be of any run, with another network, optimizer or training set.
            reason = " ".join(str(error).split())
            raise ValueError(f"run.resume: checkpoint {path} does not fit this configuration: {reason}") from error
        progress = self._progress
        self._recorder.truncate_to(progress.epoch - 1, progress.samples_seen)
        self._recorder.event(
            "resume",
            epoch=progress.epoch,
            samples_seen=progress.samples_seen,
            path=str(path),
            world_size=self._runtime.world_size,
            world_size_before=state["world_size"],
        )
        if self._runtime.is_main:
            self.store.go_on_from(path, self._position())
            clear_marker(self._directory.preempted)
        # Ranks may see the folder at different moments; rank 0's view decides.
        if not self._runtime.share([self._runtime.is_main and self._has_best(resume)])[0]:
            progress.best_top1 = -1.0  # the next evaluation is the best that this folder has
        return True

    def after_step(self) -> None:
        """At a step's edge, and between batches of an evaluation: saves if it is time, leaves if asked to.

        Raises:
            Preempted: the run has been saved and is to leave.
        """
        asked = self._listen()
        every = self._config.every_steps
        if asked == _SAVE or self._owes_save or (every is not None and self._progress.num_steps % every == 0):
            self.save()

    def between_batches(self) -> None:
        """In an evaluation: leaves if asked to (see :meth:`after_step`). A save waits for the next step's edge."""
        self._owes_save |= self._listen() == _SAVE

    def at_epoch_end(self, metrics: dict[str, Any], *, is_last: bool) -> None:
        """After everything that happens at an epoch's edge; ``metrics`` is the record of the epoch that ended."""
        top1 = metrics["val_top1"]
        is_best = top1 is not None and top1 > self._progress.best_top1
        if is_best:
            self._progress.best_top1 = top1
        if is_last or is_best or self._progress.epoch % self._config.every_epochs == 0:
            self.save(is_best=is_best)

    def save(self, *, is_best: bool = False) -> None:
        """Copies the run's state, which all ranks wait for, and starts to write it, which nobody does."""
        state = self._state.capture()
        self._last_save = time.monotonic()
        self._has_asked = self._owes_save = False
        if state is None:
            return
        self._report(self.store.wait())
        progress = self._progress
        self._saving = (progress.epoch - (not progress.is_under_way), progress.samples_seen)
        self._is_best = is_best
        self.store.start_saving(state, self._position(), is_best=is_best)

    def finish(self) -> None:
        """Waits for the last checkpoint, and tries once more if it failed; call at the end of a run.

        Raises:
            NotSavedError: there is no such file, as on a full disk; the next start trains on from the one before.
        """
        self._agreed.finish()
        self._report(self.store.wait())
        if self._is_lost():
            time.sleep(_PAUSE_SECONDS)
            self.save(is_best=self._is_best)
            self._report(self.store.wait())
        if self._is_lost():
            raise NotSavedError(
                f"the trained network could not be saved: {self._lost}; started again, the run goes on from the "
                "checkpoint before"
            )
        if self._runtime.is_main:
            clear_marker(self._directory.preempted)

    def close(self) -> None:
        self.store.close()

    def _is_lost(self) -> bool:
        """Whether rank 0 could not write the last checkpoint: the same on all ranks."""
        return bool(self._runtime.share([self._lost is not None])[0])

    def _has_best(self, resume: str) -> bool:
        """Whether there is a best checkpoint of the run that goes on. One of a part that was left is set aside at the
        start that leaves it; if that process is killed before it has saved another, the next finds none."""
        return (
            self.store.best.exists()
            if self._means_newest(resume)
            else self.store.keep_best_of(self._progress.best_top1)
        )

    def _position(self) -> Position:
        progress = self._progress
        return Position(progress.epoch, self._state.stream.cursor if progress.is_under_way else 0)

    def _listen(self) -> int:
        self._report(self.store.finished())
        asked = self._agreed(self._request())
        if asked > _SAVE:
            self._leave(asked - _SAVE)
        return asked

    def _request(self) -> int:
        if self._signals.received:
            return _SAVE + self._signals.received
        minutes = self._config.every_minutes
        is_due = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        if self._runtime.is_main and is_due and not self._has_asked:
            self._has_asked = True
            return _SAVE
        return _NOTHING

    def _leave(self, signal_number: int) -> None:
        self._agreed.finish()
        self.save()
        progress = self._progress
        if self._runtime.is_main:
            self._report(self.store.wait())
            where = {"epoch": progress.epoch, "samples_seen": progress.samples_seen}
            self._recorder.event("preempt", **where, signal=Signals(signal_number).name)
            write_marker(self._directory.preempted, **where, signal=Signals(signal_number).name)
        self._runtime.barrier()
        if self._lost is not None:
            raise Preempted(f"not saved: {self._lost}; the next start goes on from the checkpoint before")
        raise Preempted(
            f"saved at epoch {progress.epoch}, {progress.samples_seen} samples; the next start goes on there"
        )

    def _report(self, written: Written | None) -> None:
        if written is None:
            return
        self._lost = None if written.is_saved else written.error
        epoch, samples_seen = self._saving
        where = {"epoch": epoch, "samples_seen": samples_seen}
        if written.is_saved:
            self._recorder.event("checkpoint", **where, path=written.path.name)
            if written.error is not None:
                message = (
                    f"checkpoint {written.path.name} is written; best.pt or older ones are not as they should be: "
                )
                self._recorder.event("warning", **where, message=message + written.error)
        else:
            message = f"checkpoint {written.path.name} could not be written: {written.error}; those before are kept"
            self._recorder.event("warning", **where, message=message)

    def _find(self, resume: str) -> tuple[Path, dict[str, Any]] | None:
        if self._means_newest(resume):
            # Ranks may see the folder at different moments; rank 0's view decides.
            newest = self.store.load_newest() if self._runtime.is_main else None
            is_unreadable = self._runtime.is_main and newest is None and bool(self.store.paths())
            if self._runtime.share([is_unreadable])[0]:
                raise ValueError(
                    f"run.dir: no checkpoint in {self.store.folder} can be read; run.resume=FILE goes on from another, "
                    "such as best.pt there, and run.resume=never moves the run aside and starts afresh"
                )
            name = self._runtime.share_text("" if newest is None else str(newest[0]))
            if name:
                return newest or (Path(name), load_state(Path(name), is_elsewhere=True))
        return None if resume in ("auto", "never") else (Path(resume), load_state(Path(resume)))

    def _means_newest(self, resume: str) -> bool:
        return resume == "auto" or self._is_restart
