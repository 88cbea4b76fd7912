"""Faults that strike a rank from within its process at a chosen moment of training, and notes of what it trains on.

Installed in a rank's process by the benchmark; the trainer knows nothing of it.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rank_agent import Rank
from small_run import SAMPLES

import locsgd_dist.validation as validation_module
from locsgd_dist.batching import BatchController
from locsgd_dist.checkpoint.file import _HashingFile
from locsgd_dist.data.streams import TrainStream
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.progress import Progress
from locsgd_dist.run_state import RunState
from locsgd_dist.saving import Checkpointer
from locsgd_dist.step import TrainStep

MOMENTS = ("first step", "mid-epoch", "at a shift", "at a doubling", "while saving", "in evaluation")
MID_EPOCH = SAMPLES + 80
"""Samples before the step that is struck in the middle of the second epoch; the last checkpoint is 3 steps old."""
SHIFT, EVALUATION, SAVE = 2, 3, 5
"""Which of its kind is struck."""
NOT_FINITE = {0, MID_EPOCH - 16, 2 * SAMPLES - 6, 2 * SAMPLES + 32}
"""Samples before the steps in which one rank's images are NaN, where that is asked for."""
FULL_DISK_BYTES = 4096
"""Files cannot grow beyond this while the disk is full."""


class RankRaisedError(Exception):
    """Stands for any error of the user's code."""


class Strike:
    """Makes one fault happen once, at one moment, on one rank.

    Args:
        rank: of this process.
        victim: the rank that is struck.
        kind: ``kill``, ``term all``, ``term one``, ``usr1 one``, ``raise``, ``disk full``, ``disk full, kill``; None:
            never.
        moment: one of :data:`MOMENTS`.
    """

    def __init__(self, rank: Rank, victim: int, kind: str | None, moment: str):
        self._rank, self._kind, self._moment = rank, kind, moment
        self._is_armed = kind is not None and rank.rank == victim
        self._is_disk_full = False

    def __call__(self, moment: str) -> None:
        if not self._is_armed or moment != self._moment:
            return
        self._is_armed = False
        self._rank.tell({"struck": moment})
        match self._kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "term all":
                os.killpg(0, signal.SIGTERM)
            case "term one":
                os.kill(os.getpid(), signal.SIGTERM)
            case "usr1 one":
                os.kill(os.getpid(), signal.SIGUSR1)
            case "raise":
                raise RankRaisedError(moment)
            case "disk full" | "disk full, kill":
                # The kernel refuses what the process writes, as it does on a full disk.
                self._is_disk_full = True
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
            case other:
                raise AssertionError(other)

    def checkpoint_failed(self) -> None:
        """There is room again; or, for the process, no need of any."""
        if self._is_disk_full:
            self._is_disk_full = False
            self._rank.tell({"checkpoint_failed": True})
            if self._kind == "disk full, kill":
                os.kill(os.getpid(), signal.SIGKILL)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def install(rank: Rank, strike: Strike, *, raises: bool, not_finite: bool) -> None:
    """Wraps the trainer's parts in this process.

    Args:
        raises: the strike is an exception: then of the training thread, while saving too.
        not_finite: the last rank's images are NaN in the steps of :data:`NOT_FINITE`.
    """
    _note_steps(rank, not_finite)
    _strike_in_steps(strike)
    _strike_at_edges(strike)
    _strike_while_saving(strike, rank.rank == 0 and not raises)


class _Now:
    """Of the run in this process."""

    progress: Progress
    ids: list[int] = []
    in_step = False
    growing = False


def _note_steps(rank: Rank, not_finite: bool) -> None:
    init, count_step, stream_init = Progress.__init__, Progress.count_step, TrainStream.__init__
    step = TrainStep.__call__

    def init_noted(self: Progress, device: torch.device) -> None:
        init(self, device)
        _Now.progress = self

    def stream_noted(self: TrainStream, sampler: Any, fetcher: Any, transform: Any, mix: Any = None) -> None:
        def noted(images: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
            _Now.ids = indices.tolist()
            return transform(images, indices, epoch)

        stream_init(self, sampler, fetcher, noted, mix)  # type: ignore[arg-type]

    def step_noted(self: TrainStep, batches: Any, tally: Any) -> None:
        (batch,) = batches
        _Now.ids = _Now.ids[: batch.local_size]
        if not_finite and rank.rank == rank.world_size - 1 and _Now.progress.samples_seen in NOT_FINITE:
            batches = [replace(batch, images=torch.full_like(batch.images, torch.nan))]
        _Now.in_step = True
        step(self, batches, tally)
        _Now.in_step = False

    def count_noted(self: Progress, samples: int) -> None:
        before = self.samples_seen
        count_step(self, samples)
        rank.tell({"epoch": self.epoch, "before": before, "ids": _Now.ids})

    Progress.__init__, Progress.count_step = init_noted, count_noted  # type: ignore[method-assign]
    TrainStream.__init__ = stream_noted  # type: ignore[method-assign]
    TrainStep.__call__ = step_noted  # type: ignore[method-assign]


def _strike_in_steps(strike: Strike) -> None:
    """After the backward pass, before the weights move."""
    forward_backward = TrainStep._forward_backward

    def struck(self: TrainStep, *arguments: Any) -> None:
        forward_backward(self, *arguments)
        if _Now.in_step:
            moments = {0: "first step", MID_EPOCH: "mid-epoch"}
            strike(moments.get(_Now.progress.samples_seen, ""))

    TrainStep._forward_backward = struck  # type: ignore[method-assign]


def _strike_at_edges(strike: Strike) -> None:
    """Between the steps of a shift, of a doubling, of an evaluation."""
    advance, scale = LocalizedLearner.advance, BatchController._scale_learning_rates
    grow, evaluate = BatchController.grow, validation_module.evaluate
    shifts, evaluations = _counter(), _counter()

    def advance_struck(self: LocalizedLearner, *arguments: Any) -> Any:
        result = advance(self, *arguments)
        if _Now.progress.epoch > 0 and shifts() == SHIFT:
            strike("at a shift")
        return result

    def grow_struck(self: BatchController, *arguments: Any, **keywords: Any) -> None:
        _Now.growing = True
        grow(self, *arguments, **keywords)
        _Now.growing = False

    def scale_struck(self: BatchController) -> None:
        scale(self)
        if _Now.growing:
            strike("at a doubling")

    def evaluate_struck(*arguments: Any, between: Callable[[], None], **keywords: Any) -> list[float]:
        is_it = evaluations() == EVALUATION

        def listen() -> None:
            if is_it:
                strike("in evaluation")
            between()

        return evaluate(*arguments, between=listen, **keywords)

    LocalizedLearner.advance = advance_struck  # type: ignore[method-assign]
    BatchController.grow = grow_struck  # type: ignore[method-assign]
    BatchController._scale_learning_rates = scale_struck  # type: ignore[method-assign]
    validation_module.evaluate = evaluate_struck  # type: ignore[assignment]


def _strike_while_saving(strike: Strike, writes: bool) -> None:
    """In the writing thread with a part of the file written; on ranks that do not write, before the state is copied."""
    capture, write, report = RunState.capture, _HashingFile.write, Checkpointer._report
    saves, pieces = _counter(), _counter()
    is_it = False

    def capture_struck(self: RunState) -> Any:
        nonlocal is_it
        is_it = saves() == SAVE
        if is_it and not writes:
            strike("while saving")
        return capture(self)

    def write_struck(self: _HashingFile, data: Any) -> int:
        count = write(self, data)
        if is_it and writes and pieces() == 20:
            self._file.flush()
            strike("while saving")
        return count

    def report_struck(self: Checkpointer, written: Any) -> None:
        report(self, written)
        if written is not None and written.error is not None:
            strike.checkpoint_failed()

    RunState.capture = capture_struck  # type: ignore[method-assign]
    _HashingFile.write = write_struck  # type: ignore[method-assign]
    Checkpointer._report = report_struck  # type: ignore[method-assign]


def _counter() -> Callable[[], int]:
    """Counts its calls, from 1."""
    count = 0

    def counted() -> int:
        nonlocal count
        count += 1
        return count

    return counted
