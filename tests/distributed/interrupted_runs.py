"""Training in the worlds of a rank pool, cut off between two steps and gone on with. Imported by name on every rank."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rank_pool import free_ports, world_of_its_own
from torch import Tensor, nn
from torch.utils.data import Dataset

from locsgd_dist.config import parse_config
from locsgd_dist.faults import Preempted
from locsgd_dist.recording import RunDirectory
from locsgd_dist.trainer import Trainer

#: What a clock decides. The footprint is not among it: on the CPU it is counted, and the batch follows it.
MEASURED = {"seconds", "cpu_seconds", "eval_seconds", "images_per_second"}

#: What threads of gloo's may still hold, at the peak of a step, of tensors that finished collectives were given. With
#: every one of them held to the step's end, a step of :func:`small_network` counts at most 928 bytes more.
LEFT_TO_GLOO = 1024


class CutOffError(Exception):
    """Stands for the end of the process."""


@dataclass
class StepNotes:
    """One step of one rank."""

    labels: list[int]
    """Of the samples that it trained on."""
    lr: float
    moved: set[str]
    """Names of weights, statistics and momenta that are not what they were before."""
    is_finite: bool
    """All of those after it."""


class Outcome(NamedTuple):
    """What came of a training on one rank."""

    end: str
    """finished, cut off or preempted."""
    steps: list[StepNotes]
    states: list[dict[str, Any]]
    """Weights and buffers of the network, and of its moving average if it has one."""


class NotedSteps:
    """A trainer's step that takes notes, and that ends the process, or signals to it, after so many."""

    def __init__(self, trainer: Trainer, *, cut_after: int | None, signal_after: int | None):
        self._trainer = trainer
        self._step = trainer.step
        self._cut_after, self._signal_after = cut_after, signal_after
        self.notes: list[StepNotes] = []

    def __call__(self, batches: Any, tally: Any) -> None:
        if len(self.notes) == self._cut_after:
            raise CutOffError
        before = self._state()
        self._step(batches, tally)
        after = self._state()
        moved = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
        labels = [label for batch in batches for label in batch.targets[: batch.local_size].tolist()]
        is_finite = all(bool(value.isfinite().all()) for value in after.values())
        self.notes.append(StepNotes(labels, self._trainer.optimizer.lr, moved, is_finite))
        if len(self.notes) == self._signal_after:
            os.kill(os.getpid(), signal.SIGUSR1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def _state(self) -> dict[str, Tensor]:
        momenta = {
            f"{name}.{key}": value
            for name, state in self._trainer.optimizer.state_dict().items()
            for key, value in state.items()
        }
        return {name: value.clone() for name, value in (self._trainer.model.state_dict() | momenta).items()}


def train(
    flags: list[str],
    *,
    cut_after: int | None = None,
    signal_after: int | None = None,
) -> Outcome:
    """Trains in this process's world."""
    # A process that has drawn random numbers before must not differ from one that has not.
    random.seed(os.getpid())
    torch.manual_seed(os.getpid())
    with Trainer(parse_config(["--config", "quickstart", *flags])) as trainer:
        steps = NotedSteps(trainer, cut_after=cut_after, signal_after=signal_after)
        trainer.step = steps  # type: ignore[assignment]
        end = "finished"
        try:
            trainer.fit()
        except CutOffError:
            end = "cut off"
        except Preempted:
            end = "preempted"
        models = [trainer.model] if trainer.ema is None else [trainer.model, trainer.ema]
        states = [{name: value.numpy().copy() for name, value in model.state_dict().items()} for model in models]
        return Outcome(end, steps.notes, states)


def train_on_rank(ports: list[int], flags: list[str], options: dict[str, Any], only_rank: int | None = None) -> Outcome:
    """:func:`train` in a world of its own (the trainer makes and closes one), after which the pool's is put back.

    Args:
        only_rank: the one rank for which ``signal_after`` holds; None: all.
    """
    if only_rank is not None and int(os.environ["RANK"]) != only_rank:
        options = {**options, "signal_after": None}
    with world_of_its_own(ports):
        return train(flags, **options)


def run(pool: Any, flags: list[str], *, only_rank: int | None = None, **options: Any) -> list[Outcome]:
    """On all ranks of ``pool``; in this process where there is none."""
    if pool is None:
        return [train(flags, **options)]
    return pool.run(train_on_rank, free_ports(2), flags, options, only_rank)


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run but for times."""
    recorded = []
    for metrics in RunDirectory(run_dir).load_metrics():
        record = {key: value for key, value in metrics.items() if key not in MEASURED}
        if metrics["world_size"] > 1:
            record["footprint_bytes"] = FootprintOfRanks(metrics["footprint_bytes"])
        recorded.append(record)
    return recorded


class FootprintOfRanks(int):
    """Bytes that equal others but for what threads of gloo's may hold."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and abs(self - other) <= LEFT_TO_GLOO


class Numbered(Dataset[tuple[Tensor, int]]):
    """Images each of a class of its own, which so is the sample's number; one of them may be unusable.

    Args:
        poisoned: the number of an image that is not finite.
    """

    def __init__(self, count: int, seed: int, poisoned: int | None):
        self.num_classes = max(2, count)
        self._count, self._seed, self._poisoned = count, seed, poisoned

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.random.default_rng([self._seed, index]).random((3, 16, 16), dtype=np.float32))
        return torch.full_like(image, torch.nan) if index == self._poisoned else image, index


def numbered(split: str, count: int, poisoned: int | None = None) -> Numbered:
    return Numbered(count, 0, poisoned) if split == "train" else Numbered(count, 1, None)


def small_network(num_classes: int) -> nn.Module:
    """With batch norms and layers enough for a boundary."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, num_classes),
    )
