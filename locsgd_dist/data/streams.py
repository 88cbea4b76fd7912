"""What the training loop iterates: batches on the device, of one rank's samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from locsgd_dist.data.augment import BatchTransform
from locsgd_dist.data.in_memory import RawBatch
from locsgd_dist.data.sampler import EpochSampler, StepPlan

Mix = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""(images, targets, epoch, cursor) -> mixed images and [b, num_classes] targets."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step."""

    images: Tensor
    """float32 [b, 3, H, W] on the device, normalised."""

    targets: Tensor
    """int64 [b], or float32 [b, num_classes] under MixUp or CutMix."""

    global_size: int
    """Samples of this step over all ranks, so that a loss can be weighted exactly."""

    local_size: int
    """Samples of this rank that count: b, or 0 where fewer samples than ranks were left. Then `images` holds one
    sample of another rank, only so that this rank can take part in the step's collectives."""


class Fetcher(Protocol):
    """Brings the samples of a plan to the device."""

    def start(self, plan: StepPlan) -> Iterator[RawBatch]:
        """Begin a plan; an iterator from an earlier plan must not be used after it."""

    def close(self) -> None:
        """Stop workers."""


class TrainStream:
    """An endless supply of epochs, each a permutation of the training set, at a batch size that may change.

    Iterating goes on from the cursor to the end of the epoch. A batch counts as consumed from the moment it is
    handed out: after k batches, `cursor` and `state_dict()` stand behind the k-th, however many more are being
    prefetched. Every sample is handed out once an epoch, on one rank, whatever the batch and world sizes were.
    """

    def __init__(
        self, sampler: EpochSampler, fetcher: Fetcher, transform: BatchTransform, mix: Mix | None = None
    ) -> None:
        self._sampler = sampler
        self._fetcher = fetcher
        self._transform = transform
        self._mix = mix
        self._fetched: Iterator[RawBatch] | None = None

    @property
    def epoch(self) -> int:
        return self._sampler.epoch

    @property
    def cursor(self) -> int:
        """Samples of this epoch handed out so far, over all ranks."""
        return self._sampler.cursor

    @property
    def per_gpu_batch(self) -> int:
        return self._sampler.per_gpu

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch."""
        self._seek(epoch, 0)

    def set_per_gpu_batch(self, per_gpu: int) -> None:
        """Change the batch size from the next batch on, also in mid-epoch; what was prefetched is discarded."""
        if per_gpu != self._sampler.per_gpu:
            self._sampler.per_gpu = per_gpu
            self._fetched = None

    def __len__(self) -> int:
        """Steps left in this epoch at the present batch size."""
        return len(self._sampler.remaining())

    def __iter__(self) -> Iterator[Batch]:
        while self._sampler.cursor < self._sampler.num_samples:
            if self._fetched is None:
                self._fetched = self._fetcher.start(self._sampler.remaining())
            raw = next(self._fetched)
            images = self._transform(raw.images, raw.indices, self._sampler.epoch)
            targets = raw.targets
            if self._mix is not None:
                images, targets = self._mix(images, targets, self._sampler.epoch, raw.step.cursor)
            self._sampler.cursor = raw.step.cursor + raw.step.global_size
            yield Batch(images, targets, raw.step.global_size, raw.step.local_size)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._sampler.epoch, "cursor": self._sampler.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where the state is of a larger training set."""
        self._seek(state["epoch"], state["cursor"])

    def _seek(self, epoch: int, cursor: int) -> None:
        self._sampler.move_to(epoch, cursor)
        self._fetched = None

    def close(self) -> None:
        self._fetched = None
        self._fetcher.close()


class EvalStream:
    """The validation set, each sample once on one rank: nothing is padded, so a rank may get nothing."""

    def __init__(
        self,
        num_samples: int,
        fetcher: Fetcher,
        transform: BatchTransform,
        *,
        rank: int,
        world_size: int,
        batch: int,
    ) -> None:
        self._plan = StepPlan(torch.arange(num_samples), rank, world_size, batch)
        self._num_batches = -(-len(range(rank, num_samples, world_size)) // batch)
        self._fetcher = fetcher
        self._transform = transform

    def __len__(self) -> int:
        """Batches of this rank; other ranks may have one less or more."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        fetched = self._fetcher.start(self._plan)
        # Only the last step can be without a sample for this rank: its stand-in stays unread.
        for _ in range(self._num_batches):
            raw = next(fetched)
            images = self._transform(raw.images, raw.indices, 0)
            yield Batch(images, raw.targets, raw.step.global_size, raw.step.local_size)

    def close(self) -> None:
        self._fetcher.close()
