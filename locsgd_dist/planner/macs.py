"""Multiply-adds of a training step per image, layer by layer, at every boundary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from locsgd_dist.baselines.stochastic_depth import droppable_blocks, with_droppable_blocks
from locsgd_dist.config import Config
from locsgd_dist.data import DataShape
from locsgd_dist.localized import Layer, LayerMap, LocalizedLearner
from locsgd_dist.models import build_model


@dataclass(frozen=True)
class NetworkMacs:
    """Multiply-adds per image of a step at one boundary, all ranks' work together; expected ones where blocks are
    skipped at random.

    Attributes:
        forward: of the whole network.
        backward: of the SGD region: weight gradients, and input gradients but where nothing before needs them.
        localized: of one update of every layer that learns locally, on every image.
        localized_per_batch: of one update of every layer that learns locally, beside that: once for a batch, not for
            each of its images.
        prefix: of the localized region's part of the forward pass.
    """

    forward: float
    backward: float
    localized: float
    localized_per_batch: float
    prefix: float


def network_macs(config: Config, shape: DataShape, boundaries: Iterable[int]) -> dict[int, NetworkMacs]:
    """Counts at each of ``boundaries`` on ``meta`` tensors: convolutions and linear maps, nothing else.

    Raises:
        ValueError: the network is unknown, or a boundary lies beyond it.
        RuntimeError, NotImplementedError, TypeError: it does not run on tensors without values.
    """
    with torch.device("meta"):
        model = build_model(replace(config.model, weights=None), shape.num_classes).to("meta").eval()
        example = torch.empty(1, shape.channels, shape.image_size, shape.image_size)
    model = with_droppable_blocks(model, config.stochastic_depth)
    learner = LocalizedLearner(model, example, rule=config.localized.make_rule())
    runs = running_probabilities(model, learner.layers)

    def total(layers: Iterable[Layer]) -> float:
        return sum(runs[layer.index] * layer.macs for layer in layers)

    def updates(num_samples: int) -> float:
        return sum(runs[layer.index] * learner.rule.macs(layer, num_samples) for layer in learner.updated_layers)

    counts: dict[int, NetworkMacs] = {}
    for boundary in sorted(set(boundaries)):
        learner.advance(boundary)
        with torch.enable_grad(), noting_input_gradients(learner.layers) as with_input_gradient:
            model(example)
        region = learner.layers[boundary:]
        counts[boundary] = NetworkMacs(
            forward=total(learner.layers),
            backward=total(region) + total(layer for layer in region if layer.index in with_input_gradient),
            localized=updates(1) - updates(0),
            localized_per_batch=updates(0),
            prefix=total(learner.layers[:boundary]),
        )
    return counts


def running_probabilities(model: nn.Module, layers: LayerMap) -> list[float]:
    """[L] the probability that each layer runs in a training step: below 1 in blocks that stochastic depth skips."""
    skipped = {p: block.survival for block in droppable_blocks(model) for p in block.branch_parameters()}
    return [skipped.get(layer.weight, 1.0) for layer in layers]


@contextmanager
def noting_input_gradients(layers: LayerMap) -> Iterator[set[int]]:
    """Collects the indices of layers whose input requires a gradient in the forward passes inside."""
    with_input_gradient: set[int] = set()
    handles = [
        layer.module.register_forward_pre_hook(_see_input(layer.index, with_input_gradient), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield with_input_gradient
    finally:
        for handle in handles:
            handle.remove()


def _see_input(index: int, with_input_gradient: set[int]) -> Any:
    """Forward pre-hook: an input that requires a gradient costs its layer the second half of the backward pass."""

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
            with_input_gradient.add(index)

    return see
