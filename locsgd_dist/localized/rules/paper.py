"""The paper's rule, and the controls that it has to be better than."""

from __future__ import annotations

import torch
from torch import Tensor

from locsgd_dist.localized.layers import Layer
from locsgd_dist.localized.rules.registry import register_rule
from locsgd_dist.localized.rules.rule import LocalizedRule


@register_rule("hebbian")
class Hebbian(LocalizedRule):
    """The paper's rule (eqs. 3 and 4): the pre-activation output takes the place of the error."""


@register_rule("anti_hebbian")
class AntiHebbian(LocalizedRule):
    """A control: the same length in the opposite direction."""

    def step(self, weights: list[Tensor], deltas: list[Tensor], size: float) -> None:
        super().step(weights, deltas, -size)


@register_rule("random")
class RandomDirection(LocalizedRule):
    """A control: the same length in a direction drawn anew each step from (seed, layer, step), alike on all ranks."""

    num_gemms = 0

    def delta(self, layer: Layer, a: Tensor, z: Tensor, step: Tensor) -> Tensor:
        return _random_direction(layer.weight, self.seed, layer.index, step)


# A generator cannot be made inside a compiled graph: as an operator of its own the draw is a node like any other.
@torch.library.custom_op("locsgd_dist::random_direction", mutates_args=())
def _random_direction(weight: Tensor, seed: int, layer: int, step: Tensor) -> Tensor:
    generator = torch.Generator(device=weight.device)
    generator.manual_seed(hash((seed, layer, int(step))) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randn(weight.shape, generator=generator, device=weight.device)


@_random_direction.register_fake
def _(weight: Tensor, seed: int, layer: int, step: Tensor) -> Tensor:
    return torch.empty(weight.shape, device=weight.device)


@register_rule("frozen")
class Frozen(LocalizedRule):
    """No update at all: what the rule is to be better than."""

    updates = False

    def __init__(self, seed: int = 0):
        super().__init__(seed)
