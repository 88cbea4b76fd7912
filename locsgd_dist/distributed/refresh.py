"""Refresh steps: every n-th step the localized region learns by its true gradient too, from all or part of the batch.

Its gradients are reduced beside the DDP wrapper, whose buckets hold the SGD region alone: wrapping anew for each
refresh would cost more than the reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from locsgd_dist.distributed.buckets import REFRESH_BUCKET_BYTES, cut
from locsgd_dist.distributed.traffic import Traffic
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner


class Refresh:
    """Counts steps, says which are refresh steps, and reduces the localized region's gradients in those.

    Args:
        learner: of the localized region.
        group: the data group, or None for a world of one.
        traffic: counts each all-reduce's payload as gradients.
        config: the ``localized`` section, of which this reads what begins with ``refresh``.

    Attributes:
        interval: every so many steps of the run are refresh steps; set it at any time, on all ranks alike. The first
            gap after a change may be shorter than either interval, or nearly as long as both.
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
        self._in_flight: list[Callable[[], object]] = []

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
    def start_reducing(self, share: float = 1.0) -> None:
        """After the region's last backward pass of the step: starts to average its gradients over ranks, in buckets.

        Every rank calls it in the same place of the same step. A parameter without a gradient on some rank counts as
        zero there.

        Args:
            share: of this rank's samples in the step, the share that has backpropagated through the region: its
                gradients become those of the mean loss of these samples.
        """
        parameters = self._learner.released
        self._scale(parameters, 1 / share)
        if self._world_size > 1:
            for bucket in _buckets(parameters):
                # Divided before the sum, as DDP does: the same bits.
                flat = _gather(bucket).div_(self._world_size)
                self._in_flight.append(self._start_all_reduce(flat))

    @torch.no_grad()
    def finish_reducing(self) -> None:
        """Before the optimizer's step: waits for the averages and applies the gain."""
        pending, self._in_flight = self._in_flight, []
        for wait in pending:
            wait()
        self._scale(self._learner.released, self._gain)

    def _scale(self, parameters: Sequence[nn.Parameter], factor: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)

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


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, cut into lists of one dtype."""
    for _, group in groupby(parameters, key=lambda parameter: parameter.dtype):
        same = list(group)
        for part in cut([p.numel() * p.element_size() for p in same], REFRESH_BUCKET_BYTES):
            yield same[part]


def _gather(bucket: Sequence[nn.Parameter]) -> Tensor:
    """Moves the gradients of one dtype into a flat tensor, of which they are views from here on."""
    flat = torch.empty(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
    parts = flat.split([p.numel() for p in bucket])
    for parameter, part in zip(bucket, parts, strict=True):
        # As the weight lies in memory, which is how autograd lays out gradients too: alike on all ranks.
        view = part.as_strided(parameter.size(), torch.empty_like(parameter, device="meta").stride())
        if parameter.grad is None:
            view.zero_()
        else:
            view.copy_(parameter.grad)
        parameter.grad = view
    return flat
