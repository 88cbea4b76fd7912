"""Which samples a step takes: one permutation per (seed, epoch), one cursor in samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from locsgd_dist.data.hashing import hash64


@dataclass(frozen=True)
class Step:
    """One rank's share of one step."""

    cursor: int
    """Samples of the epoch that came before this step, over all ranks."""

    indices: Tensor
    """int64 [max(local_size, 1)]: this rank's samples. Where none is left for this rank, the step's first
    sample stands in, so that the rank can take part in the step's collectives."""

    local_size: int
    """Samples that count for this rank; 0 when `indices` holds the stand-in."""

    global_size: int
    """Samples of the step over all ranks."""


@dataclass(frozen=True)
class StepPlan:
    """The steps from `start` to the end of an epoch at one batch size; iterating again gives the same steps.

    Each step takes the next `world_size * per_gpu` entries of `order` (the last one: what is left), of which
    this rank takes every `world_size`-th. So all ranks know what a step holds without a word between them, and
    it depends on the past through the cursor alone.
    """

    order: Tensor
    """int64 [num_samples]: the epoch's permutation."""

    rank: int
    world_size: int
    per_gpu: int
    start: int = 0
    draw: int = 0
    """Which of their random transforms the images get."""

    def __len__(self) -> int:
        remaining = len(self.order) - self.start
        return -(-remaining // (self.world_size * self.per_gpu))

    def __iter__(self) -> Iterator[Step]:
        stride = self.world_size * self.per_gpu
        for cursor in range(self.start, len(self.order), stride):
            shared = self.order[cursor : cursor + stride]
            mine = shared[self.rank :: self.world_size]
            yield Step(cursor, mine if len(mine) else shared[:1], len(mine), len(shared))

    def to(self, device: torch.device) -> StepPlan:
        """The same plan with its permutation on `device`: its steps are slices there, nothing is copied."""
        return replace(self, order=self.order.to(device))


class EpochSampler:
    """The cursor over an epoch's permutation; batch size and world size may differ from step to step.

    Its position is (epoch, cursor), whatever the number of ranks and the batch size.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        per_gpu: int,
        num_draws: int | None = None,
        draws_from: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        self.num_samples = num_samples
        self.epoch = 0
        self.cursor = 0
        self.per_gpu = per_gpu
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.num_draws = num_draws
        self._draws_from = draws_from
        self._permutation: tuple[int, Tensor] | None = None

    @property
    def per_gpu(self) -> int:
        """Samples per rank and step. Setting it below 1 raises ValueError."""
        return self._per_gpu

    @per_gpu.setter
    def per_gpu(self, per_gpu: int) -> None:
        if per_gpu < 1:
            raise ValueError(f"batch.per_gpu must be at least 1, got {per_gpu}")
        self._per_gpu = per_gpu

    @property
    def recurring_draw(self) -> int | None:
        """Which of `num_draws` the images of this epoch get, from `draws_from` on; None: one of their own."""
        is_own = self.num_draws is None or self.epoch < self._draws_from
        return None if is_own else (self.epoch - self._draws_from) % self.num_draws  # type: ignore[operator]

    @property
    def draw(self) -> int:
        """Which of their random transforms the images of this epoch get."""
        recurring = self.recurring_draw
        return self.epoch if recurring is None else self._draws_from + recurring

    def move_to(self, epoch: int, cursor: int) -> None:
        """Stand `cursor` samples into `epoch`. Raises ValueError where there is no such place."""
        if epoch < 0 or not 0 <= cursor <= self.num_samples:
            raise ValueError(
                f"no position {cursor} in epoch {epoch} of a training set of {self.num_samples} samples "
                f"(was data.train_samples changed?)"
            )
        self.epoch, self.cursor = epoch, cursor

    def remaining(self) -> StepPlan:
        """The steps left in this epoch at the present batch size."""
        return StepPlan(self._order(), self._rank, self._world_size, self.per_gpu, start=self.cursor, draw=self.draw)

    def _order(self) -> Tensor:
        if self._permutation is None or self._permutation[0] != self.epoch:
            # Drawn on the CPU, so that ranks on different devices agree on it.
            generator = torch.Generator().manual_seed(hash64(self._seed, self.epoch))
            self._permutation = self.epoch, torch.randperm(self.num_samples, generator=generator)
        return self._permutation[1]
