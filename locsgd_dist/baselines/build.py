"""From the configuration to the strategy, and what goes with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from locsgd_dist.baselines.baseline import Baseline
from locsgd_dist.baselines.pruning import Pruning
from locsgd_dist.baselines.stochastic_depth import StochasticDepth, droppable_blocks, fold_survival
from locsgd_dist.baselines.surgery import adopt_shapes
from locsgd_dist.distributed import Runtime, resolve_device
from locsgd_dist.localized.layers import LayerMap
from locsgd_dist.models.memory_format import MIN_CHANNELS

if TYPE_CHECKING:
    from locsgd_dist.config import Config


def check_baselines(config: Config) -> None:
    """Checks that the sections go together.

    Raises:
        ValueError: one line that names the keys.
    """
    drops, prunes = config.stochastic_depth.survival < 1, config.pruning.every_epochs > 0
    if drops and prunes:
        raise ValueError("stochastic_depth.survival < 1 and pruning.every_epochs > 0 exclude each other")
    on_cpu = config.train.channels_last and resolve_device(config.train.device).type == "cpu"
    if prunes and on_cpu and config.pruning.min_channels < MIN_CHANNELS:
        raise ValueError(
            f"pruning.min_channels must be >= {MIN_CHANNELS} with train.channels_last=true on the CPU, "
            f"got {config.pruning.min_channels}"
        )
    if drops and config.train.compile:
        raise ValueError(
            "stochastic_depth.survival < 1 needs train.compile=false: every pattern of skipped blocks would be compiled"
        )
    for key in ("refresh_every", "alignment_every"):
        if (drops or prunes) and (value := getattr(config.localized, key)):
            section = "stochastic_depth.survival < 1" if drops else "pruning.every_epochs > 0"
            raise ValueError(f"{section} needs localized.{key}=0, got {value}")


def make_baseline(
    config: Config,
    networks: Sequence[nn.Module],
    layers: LayerMap,
    example_input: Tensor,
    runtime: Runtime,
) -> Baseline:
    """The strategy that the sections ``stochastic_depth`` and ``pruning`` describe.

    Args:
        networks: the network in training (its blocks droppable where they are to be dropped), then its moving average
            if there is one.
        layers: of the network.

    Raises:
        ValueError: sections that do not go together, or a network that the strategy does not fit.
    """
    check_baselines(config)
    if config.stochastic_depth.survival < 1:
        return StochasticDepth(droppable_blocks(networks[0]), config.train.seed)
    if config.pruning.every_epochs:
        return Pruning(config.pruning, layers, networks, example_input, runtime)
    return Baseline()


def restore_trained(model: nn.Module, config: Config, weights: Mapping[str, Tensor]) -> None:
    """Loads a run's weights into ``model``, which is left as a network of plain modules that computes what the trained
    one does in evaluation mode.

    Args:
        model: as built, its blocks made droppable if the run drops any.
        weights: the ``state_dict`` of the run's network.
    """
    if config.pruning.every_epochs:
        adopt_shapes(model, {name: tuple(value.shape) for name, value in weights.items()})
    model.load_state_dict(weights)
    fold_survival(model)
