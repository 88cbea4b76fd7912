"""Sets that fit in memory: held as uint8 on the device and gathered there in batches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from locsgd_dist.data.sampler import StepPlan
from locsgd_dist.data.streams import RawBatch


class InMemoryFetcher:
    """Gathers batches of a set that lies on the device."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        """
        Args:
            images: uint8 [n, H, W, C] on the device.
            targets: int64 [n] on the device.
        """
        self._images = images
        self._targets = targets

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return self._images.nbytes + self._targets.nbytes

    def start(self, plan: StepPlan) -> Iterator[RawBatch]:
        for step in plan.to(self._images.device):
            indices = step.indices.contiguous()
            yield RawBatch(step, indices, self._images[indices], self._targets[indices])

    def close(self) -> None:
        """There is nothing to stop."""
