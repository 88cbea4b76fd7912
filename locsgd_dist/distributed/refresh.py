"""Refresh steps: every n-th step the localized region learns by its true gradient too, from all or part of the batch.

Its gradients are reduced beside the DDP wrapper, whose buckets hold the SGD region alone: wrapping anew for each
refresh would cost more than the reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from locsgd_dist.distributed.traffic import Traffic
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner

BUCKET_BYTES = 25 << 20


class Refresh:
    """Counts steps, says which are refresh steps, and reduces the localized region's gradients in those.

    Args:
        learner: of the localized region.
        group: the data group, or None for a world of one.
        traffic: counts each all-reduce's payload as gradients.
        config: the ``localized`` section, of which this reads what begins with ``refresh``.

    Attributes:
        interval: steps from one refresh step to the next; set it at any time, on all ranks alike.
        enabled: whether there are any.
        fraction: share of each batch that backpropagates through the whole network; the step takes it apart.
    """

    def __init__(
        self,
        learner: LocalizedLearner,
        group: dist.ProcessGroup | None,
        traffic: Traffic,
        config: LocalizedConfig,
    ):
        self._learner = learner
        self._group = group
        self._world_size = 1 if group is None else dist.get_world_size(group)
        self._traffic = traffic
        self.enabled = config.refresh_every > 0
        self.interval = config.refresh_every
        self._recompute = config.refresh_recompute
        self.fraction = config.refresh_fraction
        self._gain = config.refresh_gain
        self._num_steps = 0

    @property
    def is_due(self) -> bool:
        """Whether the present step is one; there is nothing to refresh before the first shift."""
        return self.enabled and self._learner.boundary > 0 and (self._num_steps + 1) % self.interval == 0

    def mode(self) -> AbstractContextManager[None]:
        """Around the forward and backward passes of a refresh step."""
        return self._learner.refreshing(recompute=self._recompute)

    def finish_step(self) -> None:
        """Call at the end of every step, refresh step or not."""
        self._num_steps += 1

    @torch.no_grad()
    def reduce(self, share: float = 1.0) -> None:
        """After the backward pass: averages the region's gradients over ranks, in buckets, and applies the gain.

        Every rank calls it in the same step. A parameter without a gradient on some rank counts as zero there.

        Args:
            share: of this rank's samples in the step, the share that has backpropagated through the region: its
                gradients become those of the mean loss of these samples.
        """
        parameters = self._learner.released
        self._scale(parameters, 1 / share)
        if self._world_size > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._all_reduce([parameter.grad for parameter in parameters if parameter.grad is not None])
        self._scale(parameters, self._gain)

    def _scale(self, parameters: Sequence[nn.Parameter], factor: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)

    def _all_reduce(self, gradients: list[Tensor]) -> None:
        in_flight: list[tuple[Callable[[], object], Tensor, list[Tensor]]] = []
        for bucket in _buckets(gradients):
            # Divided before the sum, as DDP does: the same bits.
            flat = torch.cat([g.reshape(-1) for g in bucket]).div_(self._world_size)
            in_flight.append((self._start_all_reduce(flat), flat, bucket))
        for wait, flat, bucket in in_flight:
            wait()
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def _start_all_reduce(self, flat: Tensor) -> Callable[[], object]:
        """Returns what waits for its end."""
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        self._traffic.add_gradients(flat.numel() * flat.element_size())
        return work.wait

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_steps = state["num_steps"]


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors in order, cut into lists of one dtype and about ``BUCKET_BYTES`` each."""
    buckets: list[list[Tensor]] = []
    for _, same in groupby(tensors, key=lambda tensor: tensor.dtype):
        size = BUCKET_BYTES
        for tensor in same:
            if size >= BUCKET_BYTES:
                buckets.append([])
                size = 0
            buckets[-1].append(tensor)
            size += tensor.numel() * tensor.element_size()
    return buckets
