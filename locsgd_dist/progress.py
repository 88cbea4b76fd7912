"""How far a run has come, and the sums of the epoch under way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from locsgd_dist.step import Tally


class Progress:
    """Counters of a run and of its epoch. Progress is counted in samples: the batch size and the ranks may change.

    Attributes:
        epoch: the epoch under way, from 0; also the number of those that are over.
        samples_seen: training samples of the run, over all ranks.
        num_steps: optimizer steps of the run.
        best_top1: best validation top-1 so far; -1 before the first.
        is_under_way: whether the epoch has begun.
        record: the epoch's record once its training is over, while it is evaluated; else None.
        tally: loss and correct answers of this rank.
        lr, sum_of_lr: learning rate of the last step, and of all steps of the epoch together.
        steps: optimizer steps of the epoch.
        num_refreshes: refresh steps among them.
        num_updates: steps that computed localized updates.
        num_alignments: steps in which localized updates were compared with the gradient.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.epoch = 0
        self.samples_seen = 0
        self.num_steps = 0
        self.best_top1 = -1.0
        self.is_under_way = False
        self.record: dict[str, Any] | None = None
        self._clear()

    def begin_epoch(self) -> None:
        self._clear()
        self.record = None
        self.is_under_way = True

    def count_step(self, samples: int) -> None:
        """A step on so many samples, over all ranks, is over."""
        self.samples_seen += samples
        self.num_steps += 1
        self.steps += 1
        self.sum_of_lr += self.lr

    def end_epoch(self) -> None:
        self.epoch += 1
        self.is_under_way = False
        self.record = None

    def _clear(self) -> None:
        self.tally = Tally(self._device)
        self.lr = 0.0
        self.sum_of_lr = 0.0
        self.steps = 0
        self.num_refreshes = 0
        self.num_updates = 0
        self.num_alignments = 0
        self._start_clocks(0.0, 0.0)

    def _start_clocks(self, seconds: float, cpu_seconds: float) -> None:
        self._start = time.perf_counter() - seconds
        self._cpu_start = time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        """Wall-clock time of the epoch, over all processes that have worked on it."""
        return time.perf_counter() - self._start

    @property
    def cpu_seconds(self) -> float:
        """CPU time of this rank in the epoch."""
        return time.process_time() - self._cpu_start

    _COUNTERS = ("epoch", "samples_seen", "num_steps", "best_top1", "is_under_way", "record")
    _EPOCH_COUNTERS = ("lr", "sum_of_lr", "steps", "num_refreshes", "num_updates", "num_alignments")

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        return {key: getattr(self, key) for key in (*self._COUNTERS, *self._EPOCH_COUNTERS)}

    def rank_state_dict(self) -> dict[str, Any]:
        """What is this rank's own."""
        return {"tally": self.tally.sums(), "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state: dict[str, Any], ranks: Sequence[dict[str, Any]], rank: int) -> None:
        """Restores both.

        Args:
            ranks: what each rank of the earlier process group gave, as many as there are now; where their number has
                changed, one element for each present rank all the same (see :func:`shared_out`).
        """
        for key, value in state.items():
            setattr(self, key, value)
        mine = ranks[rank]
        self.tally.load(mine["tally"])
        self._start_clocks(mine["seconds"], mine["cpu_seconds"])


def shared_out(ranks: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The ranks' own progress for another number of ranks: sums go to rank 0, times are the longest."""
    if len(ranks) == world_size:
        return list(ranks)
    total = [sum(values) for values in zip(*(rank["tally"] for rank in ranks), strict=True)]
    times = {key: max(rank[key] for rank in ranks) for key in ("seconds", "cpu_seconds")}
    return [{"tally": total if rank == 0 else [0.0] * len(total), **times} for rank in range(world_size)]
