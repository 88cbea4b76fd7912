"""Sets that worker processes decode while training goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from locsgd_dist.data.hashing import hash64
from locsgd_dist.data.items import Items, Picture
from locsgd_dist.data.sampler import StepPlan
from locsgd_dist.data.streams import RawBatch

Request = tuple[int, int]
"""(draw, sample index)."""

_SAMPLE_STREAM = 3
_GRACE_SECONDS = 30
_MAX_AUTO_WORKERS = 16


class SampleDataset(Dataset[tuple[int, Tensor, int]]):
    """Decodes and transforms the sample of a request, under an RNG seeded by (seed, draw, sample index)."""

    def __init__(
        self,
        items: Items,
        chosen: NDArray[np.int64],
        transform: Callable[[Picture], Tensor],
        seed: int,
    ) -> None:
        """
        Args:
            items: a whole split.
            chosen: [n], where each sample of this data set lies in the split.
            transform: gives [C, H, W], C = 1 or 3; may draw from torch's RNG.
            seed: of the draws.
        """
        self._items = items
        self._chosen = chosen
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, request: Request) -> tuple[int, Tensor, int]:
        """Sample index, image [3, H, W], class."""
        draw, index = request
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone: torch.manual_seed would queue a call for CUDA with each sample.
            torch.default_generator.manual_seed(hash64(self._seed, draw, index, _SAMPLE_STREAM))
            picture, target = self._items[int(self._chosen[index])]
            image = self._transform(picture)
        return index, image.expand(3, -1, -1), target


class PlanSampler(Sampler[list[Request]]):
    """A batch sampler whose plan can be exchanged, so that the loader and its workers may outlive it."""

    def __init__(self) -> None:
        self.plan: StepPlan | None = None

    def __iter__(self) -> Iterator[list[Request]]:
        assert self.plan is not None, "set by WorkerFetcher.start"
        for step in self.plan:
            yield [(self.plan.draw, index) for index in step.indices.tolist()]


class WorkerFetcher:
    """Batches by a torch DataLoader. Persistent workers stay while plans come and go; others end with their plan."""

    def __init__(self, dataset: SampleDataset, *, num_workers: int, device: torch.device, persistent: bool) -> None:
        self._device = device
        self._persistent = persistent and num_workers > 0
        self._sampler = PlanSampler()
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=self._persistent,
            # Its own generator: a seed for the workers would else be drawn from the training process's.
            generator=torch.Generator(),
            worker_init_fn=outlive_sigterm if num_workers else None,
        )
        self._loaded: Iterator[Any] | None = None

    def start(self, plan: StepPlan) -> Iterator[RawBatch]:
        """Begin a plan: what an earlier one had prefetched is discarded, persistent workers stay."""
        if self._loader is None:
            raise RuntimeError("the data bundle is closed")
        self._sampler.plan = plan
        loaded = iter(self._loader)
        if self._persistent:
            self._loaded = loaded
        return self._batches(plan, loaded)

    def _batches(self, plan: StepPlan, loaded: Iterator[Any]) -> Iterator[RawBatch]:
        try:
            for step, tensors in zip(plan, loaded, strict=True):
                # From pinned memory and on the training stream: the copy of a uint8 batch takes about a hundredth
                # of the step that waits for it, so that a stream of its own would gain next to nothing.
                indices, images, targets = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
                yield RawBatch(step, indices, images.permute(0, 2, 3, 1), targets)
        finally:
            if not self._persistent:
                stop_workers(loaded)

    def close(self) -> None:
        """Stop the workers, if need be in the middle of a plan."""
        self._loader = None
        if self._loaded is not None:
            stop_workers(self._loaded)
            self._loaded = None


def stop_workers(loaded: Iterator[Any]) -> None:
    """Stop the workers behind a DataLoader's iterator.

    They also end with the last reference to it. But the traceback of an error holds one, and an iterator that is
    left to the garbage collector waits seconds for workers which it cannot reach any more.
    """
    shutdown = getattr(loaded, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


def outlive_sigterm(worker: int) -> None:
    """Let a worker outlive, for a while, a preemption signal that reaches every process of a job.

    Its rank still needs it for the step under way: a worker that died first would take the rank's emergency
    checkpoint with it. Workers end by themselves when their rank does; the alarm is for one that is stuck.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def resolve_workers(requested: int, local_world_size: int) -> int:
    """`data.workers`, with -1 resolved to this rank's share of the machine's cores (1 to 16)."""
    if requested >= 0:
        return requested
    return min(_MAX_AUTO_WORKERS, max(1, num_cores() // local_world_size))


def num_cores() -> int:
    """Cores that this process may use: under Slurm or in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
