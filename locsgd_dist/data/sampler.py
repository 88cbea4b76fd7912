"""Which samples a step takes: one permutation per (seed, epoch), one cursor in samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from locsgd_dist.data.hashing import hash64


@dataclass(frozen=True)
class BatchConfig:
    """How many images each rank takes in a step."""

    per_gpu: int = 64
    """Images per rank and step at the start; the batch policy may raise it while training."""

    def __post_init__(self) -> None:
        if self.per_gpu < 1:
            raise ValueError(f"batch.per_gpu must be at least 1, got {self.per_gpu}")


@dataclass(frozen=True)
class Step:
    """One rank's share of one step."""

    cursor: int
    """Samples of the epoch that came before this step, over all ranks."""

    indices: Tensor
    """int64 [max(local_size, 1)]: this rank's samples. Where no sample is left for this rank, the step's first
    one stands in, so that the rank can take part in the step's collectives."""

    local_size: int
    """Samples that count for this rank; 0 when `indices` holds the stand-in."""

    global_size: int
    """Samples of the step over all ranks."""


@dataclass(frozen=True)
class StepPlan:
    """The steps from `start` to the end of an epoch at one batch size; iterating it again gives the same steps.

    Each step takes the next `world_size * per_gpu` entries of `order` (the last one: what is left), of which
    this rank takes every `world_size`-th. Which samples a step holds is thus known to all ranks without a word
    between them, and depends on the past only through the cursor.
    """

    order: Tensor
    """int64 [num_samples]: the epoch's permutation."""

    rank: int
    world_size: int
    per_gpu: int
    start: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        remaining = len(self.order) - self.start
        return -(-remaining // (self.world_size * self.per_gpu))

    def __iter__(self) -> Iterator[Step]:
        for cursor in range(self.start, len(self.order), self.world_size * self.per_gpu):
            shared = self.order[cursor : cursor + self.world_size * self.per_gpu]
            mine = shared[self.rank :: self.world_size]
            yield Step(cursor, mine if len(mine) else shared[:1], len(mine), len(shared))

    def to(self, device: torch.device) -> StepPlan:
        """The same plan with its permutation on `device`, so that steps are slices there and nothing is copied."""
        return replace(self, order=self.order.to(device))


class EpochSampler:
    """The cursor over an epoch's permutation; batch size and world size may differ from step to step.

    The state is (epoch, cursor): it holds for any number of ranks and any batch size.
    """

    def __init__(self, num_samples: int, *, seed: int, rank: int, world_size: int, per_gpu: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0
        self.cursor = 0
        self._rank = rank
        self._world_size = world_size
        self._per_gpu = per_gpu
        self._order: tuple[int, Tensor] | None = None

    @property
    def per_gpu(self) -> int:
        return self._per_gpu

    @per_gpu.setter
    def per_gpu(self, per_gpu: int) -> None:
        if per_gpu < 1:
            raise ValueError(f"the per-GPU batch must be at least 1, got {per_gpu}")
        self._per_gpu = per_gpu

    def move_to(self, epoch: int, cursor: int) -> None:
        """Stand at `cursor` samples into `epoch`. Raises ValueError where the epoch is shorter."""
        if epoch < 0 or not 0 <= cursor <= self.num_samples:
            raise ValueError(
                f"no position (epoch {epoch}, sample {cursor}) in a training set of {self.num_samples} samples"
            )
        self.epoch, self.cursor = epoch, cursor

    def remaining(self) -> StepPlan:
        """The steps left in this epoch at the present batch size."""
        return StepPlan(
            self._permutation(), self._rank, self._world_size, self._per_gpu, self.cursor, self.epoch
        )

    def _permutation(self) -> Tensor:
        if self._order is None or self._order[0] != self.epoch:
            # Drawn on the CPU, so that ranks on different devices agree on it.
            generator = torch.Generator().manual_seed(hash64(self.seed, self.epoch))
            self._order = self.epoch, torch.randperm(self.num_samples, generator=generator)
        return self._order[1]
