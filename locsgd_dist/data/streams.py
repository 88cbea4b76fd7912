"""What the training loop iterates: batches of one rank's samples, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from locsgd_dist.data.augment import BatchTransform
from locsgd_dist.data.sampler import EpochSampler, Step, StepPlan


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
    """Samples of this rank that count: b, or 0 where fewer samples than ranks were left. Then `images` holds
    one sample of another rank, only so that this rank can take part in the step's collectives."""

    keys: Tensor | None = None
    """int64 [b], in [0, TrainStream.num_keys), on the host: images of one key are the same in every epoch. None where
    they never come back: augmented anew in each epoch, or mixed."""


@dataclass(frozen=True)
class RawBatch:
    """One rank's share of a step as it is stored, on the device."""

    step: Step

    indices: Tensor
    """int64 [b]."""

    images: Tensor
    """[b, H, W, C], C = 1 or 3; uint8, or float that is already normalised."""

    targets: Tensor
    """int64 [b]."""


class Fetcher(Protocol):
    """Brings the samples of a plan to the device."""

    def start(self, plan: StepPlan) -> Iterator[RawBatch]:
        """Begin a plan. Iterators of earlier plans must not be used any more."""

    def close(self) -> None:
        """Stop workers, if any, once the last iterator is gone."""


Mix = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""(images, classes, epoch, cursor) to mixed images and float32 targets [b, num_classes]."""


class TrainStream:
    """The training set in epochs, each a permutation of it, at a batch size that may change at any step.

    Iterating goes on from the cursor to the end of the epoch. A batch counts as consumed from the moment it is
    handed out: after k batches `cursor` and `state_dict()` stand behind the k-th, however many more have been
    prefetched. In an epoch each sample is handed out once, on one rank, whatever batch and world sizes were.
    """

    def __init__(
        self, sampler: EpochSampler, fetcher: Fetcher, transform: BatchTransform, mix: Mix | None = None
    ) -> None:
        self._sampler = sampler
        self._fetcher = fetcher
        self._transform = transform
        self._mix = mix
        self._fetched: Iterator[tuple[Step, RawBatch]] | None = None

    @property
    def num_keys(self) -> int | None:
        """Different images that the epochs hand out from `data.draws_from` on; None: no bound is known."""
        num_draws = self._sampler.num_draws
        return None if num_draws is None or self._mix is not None else num_draws * self._sampler.num_samples

    @property
    def epoch(self) -> int:
        return self._sampler.epoch

    @property
    def cursor(self) -> int:
        """Samples of this epoch handed out so far, over all ranks."""
        return self._sampler.cursor

    @property
    def epochs_done(self) -> float:
        """Epochs handed out so far, the present one as a fraction: what schedules follow, whatever the set's size
        was in earlier epochs."""
        return self._sampler.epoch + self._sampler.cursor / self._sampler.num_samples

    @property
    def per_gpu_batch(self) -> int:
        """Samples per rank and step from the next batch on."""
        return self._sampler.per_gpu

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch."""
        self._seek(epoch, 0)

    def set_per_gpu_batch(self, per_gpu: int) -> None:
        """Change the batch size from the next batch on, in mid-epoch too; what was prefetched is discarded."""
        if per_gpu != self._sampler.per_gpu:
            self._sampler.per_gpu = per_gpu
            self._fetched = None

    def __len__(self) -> int:
        """Steps left in this epoch at the present batch size."""
        return len(self._sampler.remaining())

    def __iter__(self) -> Iterator[Batch]:
        sampler = self._sampler
        while sampler.cursor < sampler.num_samples:
            if self._fetched is None:
                plan = sampler.remaining()
                self._fetched = zip(plan, self._fetcher.start(plan), strict=True)
            step, raw = next(self._fetched)
            images = self._transform(raw.images, raw.indices, sampler.draw)
            targets = raw.targets
            if self._mix is not None:
                images, targets = self._mix(images, targets, sampler.epoch, raw.step.cursor)
            sampler.cursor = raw.step.cursor + raw.step.global_size
            keys = None
            if self.num_keys is not None and sampler.recurring_draw is not None:
                # Of the plan's own, which lie on the host: those of the raw batch may lie on the device.
                keys = step.indices + sampler.recurring_draw * sampler.num_samples
            yield Batch(images, targets, raw.step.global_size, raw.step.local_size, keys)

    def state_dict(self) -> dict[str, int]:
        """The position, which holds for any batch size and number of ranks."""
        return {"epoch": self._sampler.epoch, "cursor": self._sampler.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position. Raises ValueError where this training set is too small for it."""
        self._seek(state["epoch"], state["cursor"])

    def _seek(self, epoch: int, cursor: int) -> None:
        self._sampler.move_to(epoch, cursor)
        self._fetched = None

    def close(self) -> None:
        """Stop the workers; the stream cannot be iterated any more if it had some."""
        self._fetched = None
        self._fetcher.close()


class EvalStream:
    """The validation set, each sample once, on one rank: nothing is padded, so a rank may get nothing."""

    def __init__(
        self,
        num_samples: int,
        fetcher: Fetcher,
        transform: BatchTransform,
        *,
        rank: int,
        world_size: int,
        per_gpu: int,
    ) -> None:
        self._plan = StepPlan(torch.arange(num_samples), rank, world_size, per_gpu)
        self._num_batches = -(-len(range(rank, num_samples, world_size)) // per_gpu)
        self._fetcher = fetcher
        self._transform = transform

    @property
    def num_rounds(self) -> int:
        """The most batches that any rank has."""
        return len(self._plan)

    def __len__(self) -> int:
        """Batches of this rank; another rank may have one less."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        fetched = self._fetcher.start(self._plan)
        # Only the last step can hold nothing for this rank; its stand-in is left unread.
        for _ in range(self._num_batches):
            raw = next(fetched)
            images = self._transform(raw.images, raw.indices, draw=0)
            yield Batch(images, raw.targets, raw.step.global_size, raw.step.local_size)

    def close(self) -> None:
        """Stop the workers; the stream cannot be iterated any more if it had some."""
        self._fetcher.close()
