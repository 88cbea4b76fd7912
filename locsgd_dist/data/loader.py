"""Sets that are decoded by worker processes while training goes on."""

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
from locsgd_dist.data.in_memory import RawBatch
from locsgd_dist.data.items import Items, Picture
from locsgd_dist.data.sampler import StepPlan

Request = tuple[int, int]
"""(epoch, sample index)."""

_SAMPLE_STREAM = 3
_GRACE_SECONDS = 30


class SampleDataset(Dataset[tuple[int, Tensor, int]]):
    """Decodes and transforms the sample of a request, with torch's RNG seeded by (seed, epoch, sample index)."""

    def __init__(
        self,
        items: Items,
        chosen: NDArray[np.int64] | None,
        transform: Callable[[Picture], Tensor],
        seed: int,
    ) -> None:
        self._items = items
        self._chosen = chosen
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self._items) if self._chosen is None else len(self._chosen)

    def __getitem__(self, request: Request) -> tuple[int, Tensor, int]:
        epoch, index = request
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: torch.manual_seed would also queue work for CUDA, for each sample anew.
            torch.default_generator.manual_seed(hash64(self._seed, epoch, index, _SAMPLE_STREAM))
            picture, target = self._items[index if self._chosen is None else int(self._chosen[index])]
            image = self._transform(picture)
        return index, image if image.shape[0] == 3 else image.expand(3, -1, -1), target


class PlanSampler(Sampler[list[Request]]):
    """The batch sampler of a DataLoader that outlives its plans."""

    def __init__(self) -> None:
        self.plan: StepPlan | None = None

    def __iter__(self) -> Iterator[list[Request]]:
        assert self.plan is not None
        for step in self.plan:
            yield [(self.plan.epoch, index) for index in step.indices.tolist()]


class WorkerFetcher:
    """Batches by a torch DataLoader, whose workers stay while plans come and go."""

    def __init__(
        self, dataset: SampleDataset, *, num_workers: int, device: torch.device, persistent: bool
    ) -> None:
        self._device = device
        self._sampler = PlanSampler()
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=persistent and num_workers > 0,
            worker_init_fn=outlive_sigterm if num_workers else None,
        )

    def start(self, plan: StepPlan) -> Iterator[RawBatch]:
        """Work through a plan. Whatever an earlier plan had prefetched is discarded; its workers are kept."""
        if self._loader is None:
            raise RuntimeError("the data bundle is closed")
        self._sampler.plan = plan
        return self._batches(plan, iter(self._loader))

    def _batches(self, plan: StepPlan, loaded: Iterator[Any]) -> Iterator[RawBatch]:
        for step, (indices, images, targets) in zip(plan, loaded, strict=True):
            # On the training stream: a uint8 batch takes a thousandth of the step that waits for it.
            indices, images, targets = (
                tensor.to(self._device, non_blocking=True) for tensor in (indices, images, targets)
            )
            yield RawBatch(step, indices, images.permute(0, 2, 3, 1), targets)

    def close(self) -> None:
        """Drop the loader, whose workers end with the last reference to it."""
        self._loader = None


def outlive_sigterm(worker: int) -> None:
    """Let a worker live a little longer than a preemption signal that reaches every process of a job.

    The rank still needs it for the step under way, and a worker that dies first would take the rank's emergency
    checkpoint with it. A worker whose rank has died ends by itself; the alarm is for one that is stuck.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def num_workers(requested: int, local_world_size: int) -> int:
    """`data.workers`, with -1 resolved to this machine's usable cores per rank (1 to 16)."""
    if requested >= 0:
        return requested
    return min(16, max(1, num_cores() // local_world_size))


def num_cores() -> int:
    """Cores this process may use, which in a container or under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
