"""Structured pruning during training in the manner of PruneTrain (Lym et al., 2019).

A group lasso on the input and output channels of every layer drives whole channels to zero; every few epochs those that
got there are cut out, and training goes on with the smaller network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locsgd_dist.baselines.baseline import Baseline
from locsgd_dist.baselines.surgery import (
    ChannelGroups,
    Surgery,
    adopt_shapes,
    check_prunable,
    is_depthwise,
    shapes_of,
)
from locsgd_dist.distributed import Runtime
from locsgd_dist.localized.layers import LayerMap
from locsgd_dist.step import Tally


@dataclass(frozen=True)
class PruningConfig:
    """Channels removed while training, by group lasso."""

    every_epochs: int = 0
    """Epochs between two removals of dead channels; 0 = no pruning; >= 0."""
    lasso_ratio: float = 0.2
    """Share of the group lasso in the loss, penalty / (loss + penalty), at the first step: it sets the penalty's
    coefficient; in (0, 1)."""
    threshold: float = 1e-4
    """A channel is removed when no weight that writes or reads it is as large as this; > 0."""
    min_channels: int = 1
    """Channels that every layer keeps; >= 1."""

    def __post_init__(self) -> None:
        if self.every_epochs < 0:
            raise ValueError(f"pruning.every_epochs must be >= 0, got {self.every_epochs}")
        if not 0 < self.lasso_ratio < 1:
            raise ValueError(f"pruning.lasso_ratio must lie in (0, 1), got {self.lasso_ratio}")
        if not self.threshold > 0:
            raise ValueError(f"pruning.threshold must be > 0, got {self.threshold}")
        if self.min_channels < 1:
            raise ValueError(f"pruning.min_channels must be >= 1, got {self.min_channels}")


class Pruning(Baseline):
    """Adds the penalty to the loss and cuts the network at epoch edges.

    Args:
        config: the ``pruning`` section.
        layers: of the network.
        networks: the network, then copies of it that are cut with it (a moving average).
        example_input: a batch that they run on.
        runtime: gives the ranks one loss and one decision.

    Raises:
        ValueError: the network has modules that cannot be cut.
    """

    def __init__(
        self,
        config: PruningConfig,
        layers: LayerMap,
        networks: Sequence[nn.Module],
        example_input: Tensor,
        runtime: Runtime,
    ):
        check_prunable(networks[0])
        self.coefficient: float | None = None
        self._config = config
        self._layers = layers
        self._networks = list(networks)
        self._example_input = example_input
        self._runtime = runtime

    @contextmanager
    def step(self, samples_seen: int, tally: Tally) -> Iterator[None]:
        yield
        if self.coefficient is None:
            self._calibrate(tally)

    def _calibrate(self, tally: Tally) -> None:
        """Sets the coefficient once there is a loss: the first step runs without the penalty."""
        loss, _, samples = self._runtime.sum(tally.sums())
        if samples:  # a step that was not finite does not count
            with torch.no_grad():
                lasso = group_lasso(self._layers).item()
            ratio = self._config.lasso_ratio
            self.coefficient = self._runtime.share([ratio / (1 - ratio) * loss / samples / lasso])[0]

    def penalty(self) -> Tensor | None:
        return None if self.coefficient is None else self.coefficient * group_lasso(self._layers)

    def end_epoch(self, epoch: int) -> Surgery | None:
        if (epoch + 1) % self._config.every_epochs:
            return None
        classifier = self._layers[-1].name
        groups = ChannelGroups(self._networks[0], self._example_input, keep_outputs=[classifier])
        magnitudes = groups.magnitudes()
        # Rank 0 decides: a last bit that differed between ranks would give them networks of different shapes.
        shared = torch.tensor(self._runtime.share(torch.cat(magnitudes).tolist()), dtype=torch.float64)
        channels = [self._dead(found) for found in shared.split([len(m) for m in magnitudes])]
        if not any(channels):
            return None
        surgery = groups.remove(channels)
        for network in self._networks:
            surgery.apply(network)
        return surgery

    def _dead(self, magnitudes: Tensor) -> list[int]:
        """Channels to remove of one group, the weakest first where too few would stay."""
        dead = (magnitudes < self._config.threshold).nonzero().flatten()
        most = max(0, len(magnitudes) - self._config.min_channels)
        return sorted(dead[magnitudes[dead].argsort(stable=True)][:most].tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient, "shapes": shapes_of(self._networks[0])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]
        for network in self._networks:
            adopt_shapes(network, state["shapes"])


def group_lasso(layers: LayerMap) -> Tensor:
    """Sum of the norms of every layer's output channels and input channels, the network's own inputs and outputs
    excepted (a scalar, differentiable)."""
    norms = []
    for layer in layers:
        taps = torch.linalg.vector_norm(layer.weight.flatten(2), dim=2) if layer.weight.dim() > 2 else layer.weight
        if layer.index < len(layers) - 1:
            norms.append(torch.linalg.vector_norm(taps, dim=1).sum())
        if layer.index > 0 and not is_depthwise(layer.module):
            norms.append(torch.linalg.vector_norm(taps, dim=0).sum())
    return torch.stack(norms).sum()
