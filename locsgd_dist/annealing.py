"""Learning rates that fall to 0 layer by layer, each at its layer's hand-over to localized learning (FreezeOut)."""

from __future__ import annotations

import itertools
import math

from torch import nn

from locsgd_dist.config import Config
from locsgd_dist.localized import LayerMap
from locsgd_dist.localized.selection import AnnealScale, scheduled_boundaries
from locsgd_dist.optimization import OptimConfig, warmup_factor


def annealed_lr(config: OptimConfig, epoch: float, epochs: int, hand_over: int, scale: AnnealScale = "none") -> float:
    """Learning rate after ``epoch`` epochs of a layer that leaves the SGD region when epoch ``hand_over`` begins.

    It falls to 0 on half a cosine that ends there, in the place of ``optim.schedule``; warm-up holds for it too
    (Brock, Lim, Ritchie, Weston, "FreezeOut: Accelerate training by progressively freezing layers", 2017).

    Args:
        epochs: of the run.
        scale: ``equal_area`` starts from ``optim.lr * epochs / hand_over``: the sum of the rate is then that of half a
            cosine from ``optim.lr`` over the whole run.
    """
    if epoch >= hand_over:
        return 0.0
    start = config.lr * (epochs / hand_over if scale == "equal_area" else 1.0)
    return start * 0.5 * (1 + math.cos(math.pi * epoch / hand_over)) * warmup_factor(config, epoch)


def hand_over_epochs(config: Config, layers: LayerMap) -> dict[nn.Parameter, int]:
    """For every parameter that the run anneals: the first epoch in which it learns locally.

    Raises:
        ValueError: as :func:`make_selector`.
    """
    found: dict[nn.Parameter, int] = {}
    if config.selection.anneal and config.localized.rule != "none":
        epochs = config.train.epochs
        boundaries = scheduled_boundaries(
            config.selection, num_layers=len(layers), block_size=layers.block_size, epochs=epochs
        )
        assert boundaries is not None
        for epoch, (before, boundary) in enumerate(itertools.pairwise([0, *boundaries[:epochs]])):
            found |= dict.fromkeys(layers.parameters(before, boundary).values(), epoch)
    return found
