"""Does a localized rule point anywhere useful? Its step is compared with the true gradient, now and then.

The gradient is there in a refresh step anyway; without refresh steps a step is backpropagated through the whole network
for the comparison alone. Either way weights move as they would have moved without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locsgd_dist.distributed.refresh import Refresh
from locsgd_dist.distributed.traffic import Traffic
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner


class Alignment:
    """The cosine between each localized layer's step, its sign included, and ``-dloss/dW``; its mean over an epoch.

    The gradient is that of the global batch. The step is what the ranks would take: of the owner's share of the batch
    where layers have owners (replicas.mode=sharded), of the global batch where updates are summed (all_reduce), else
    each rank's own, and the mean over ranks is recorded.

    Args:
        learner: of the localized region.
        refresh: of the same region.
        group: the data group, or None for a world of one.
        traffic: counts updates that are summed for the comparison.
        config: the ``localized`` section: ``alignment_every``, and ``refresh_recompute`` for a backward pass that is
            there for the comparison alone.
        sums_updates: whether replicas sum their updates (replicas.mode=all_reduce).
    """

    def __init__(
        self,
        learner: LocalizedLearner,
        refresh: Refresh,
        group: dist.ProcessGroup | None,
        traffic: Traffic,
        config: LocalizedConfig,
        *,
        sums_updates: bool = False,
    ):
        self._learner = learner
        self._refresh = refresh
        self._group = group
        self._traffic = traffic
        self._every = config.alignment_every
        self._recompute = config.refresh_recompute
        self._sums_updates = sums_updates
        self._num_steps = 0
        self._observed: dict[int, Tensor] = {}
        device = learner.layers[0].weight.device
        #: [2, L] sums of cosines and how many they are, over ranks and measurements.
        self._sums = torch.zeros(2, len(learner.layers), device=device)

    @property
    def enabled(self) -> bool:
        return self._every > 0

    @property
    def is_due(self) -> bool:
        """Whether the present step is measured; before the first shift there is nothing to measure."""
        return self._counts_step and (self._num_steps + 1) % self._every == 0

    @property
    def _counts_step(self) -> bool:
        if not self.enabled or not self._learner.updated_layers:
            return False
        return self._refresh.is_due or not self._refresh.enabled

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Around one forward and backward pass, through the whole network, of a step that is measured."""
        through_all = (
            self._refresh.mode()
            if self._refresh.enabled
            else self._learner.refreshing(recompute=self._recompute, gathers=True)
        )
        with self._learner.observing() as observed, through_all:
            yield
        for index, delta in observed.items():
            self._observed[index] = self._observed[index] + delta if index in self._observed else delta

    @torch.no_grad()
    def measure(self) -> None:
        """After the region's gradients have been reduced. They are dropped here unless the step is a refresh step.

        Every rank calls it in the same step.
        """
        sums = torch.zeros_like(self._sums)
        for index, delta in self._pooled().items():
            gradient = self._learner.layers[index].weight.grad
            if gradient is not None:
                cosine = self._cosine(index, delta, gradient)
                # A zero update or gradient has no direction; nor has one that is not finite.
                is_known = cosine.isfinite()
                sums[0, index] = cosine.where(is_known, torch.zeros_like(cosine))
                sums[1, index] = is_known
        self.discard()
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        self._sums += sums
        if not self._refresh.enabled:
            for parameter in self._learner.released:
                parameter.grad = None

    def discard(self) -> None:
        """Forgets the updates that have been looked at."""
        self._observed = {}

    def finish_step(self) -> None:
        """Call at the end of every step, before the refresh's own."""
        self._num_steps += self._counts_step

    def take(self) -> list[float | None]:
        """Mean cosine of each layer since the last call; None where none was measured. Alike on all ranks."""
        cosines, counts = self._sums.tolist()
        self._sums.zero_()
        return [cosine / count if count else None for cosine, count in zip(cosines, counts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self._num_steps, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_steps = state["num_steps"]
        self._sums.copy_(state["sums"])

    def _pooled(self) -> dict[int, Tensor]:
        """The updates that ranks would apply."""
        if self._group is None or not self._sums_updates:
            return self._observed
        pooled: dict[int, Tensor] = {}
        for layer in self._learner.updated_layers:
            # A rank without samples has observed nothing.
            observed = self._observed.get(layer.index)
            if observed is None:
                observed = torch.zeros(layer.weight.shape, device=layer.weight.device)
            delta = observed.contiguous()
            dist.all_reduce(delta, group=self._group)
            self._traffic.add_replicas(delta.numel() * delta.element_size())
            pooled[layer.index] = delta
        return pooled

    def _cosine(self, index: int, delta: Tensor, gradient: Tensor) -> Tensor:
        """Of the move that the rule would make of ``delta``: rules that hold norms do not move along it."""
        learner = self._learner
        # In double precision: a step may be a millionth of the weight that it is added to.
        before = learner.layers[index].weight.double()
        after = before.clone()
        learner.rule.step([after], [delta.double()], learner.sign * learner.lr)
        move, downhill = after - before, -gradient.double()
        return (move * downhill).sum() / (move.norm() * downhill.norm())
