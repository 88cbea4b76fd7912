"""Rules in which a layer's output channels compete for each position, so that filters do not all become alike.

Every channel k has a share ``g_k`` of each position, and learns it by ``dw_k = sum g_k * (patch(a) - y_k * w_k)``, with
``y = z - bias`` the response of the weight alone. The decay ``(sum g_k y_k) w_k`` draws a filter that wins towards norm
1 and leaves one that never wins as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from locsgd_dist.localized.layers import Layer
from locsgd_dist.localized.rules.products import channel_dim, response, sum_positions, weight_gradient
from locsgd_dist.localized.rules.registry import register_rule
from locsgd_dist.localized.rules.rule import LocalizedRule, StepLength


class CompetitiveRule(LocalizedRule):
    """``dW = g (x) patch(a) - (sum g * y) W``, one GEMM; subclasses give ``g``, the outcome of the competition.

    All output channels compete, those of different groups of a grouped convolution too: a depthwise convolution would
    have no competition otherwise.
    """

    @abstractmethod
    def signal(self, layer: Layer, z: Tensor) -> Tensor: ...

    def delta(self, layer: Layer, a: Tensor, z: Tensor, step: Tensor) -> Tensor:
        module = layer.module
        share = self.signal(layer, z)
        decay = sum_positions(module, share * response(module, z))
        hebbian = weight_gradient(module, a, share)
        weight = layer.weight.detach()
        return hebbian - decay.view(-1, *[1] * (weight.dim() - 1)) * weight


@register_rule("softhebb")
class SoftHebb(CompetitiveRule):
    """Soft winner-take-all: ``g = softmax(z / temperature)`` over channels, negated in all but the winner.

    The plasticity of SoftHebb in convolutional networks (Journé, Garcia Rodriguez, Guo, Moraitis, "Hebbian Deep
    Learning Without Feedback", ICLR 2023): ``dw_k = sum s_k g_k (patch(a) - y_k w_k)``, s = +1 for the largest output
    of a position and -1 for the others. Their learning rate, which follows each filter's distance from norm 1, is not
    part of it: the step's length is that of every rule here.

    Args:
        temperature: of the softmax; > 0. Small: the largest output takes all; large: all learn the same.
        losers: anti_hebbian (as above) or hebbian: the softmax as it is, as in single-layer SoftHebb (Moraitis et al.
            2022).
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        temperature: float = 1.0,
        losers: Literal["anti_hebbian", "hebbian"] = "anti_hebbian",
        length: StepLength = "absolute",
        hold_norm: bool = False,
    ):
        super().__init__(seed, length=length, hold_norm=hold_norm)
        if not temperature > 0:
            raise ValueError(f"localized.rule_options.temperature must be > 0, got {temperature}")
        self.temperature = temperature
        self.losers = losers

    def signal(self, layer: Layer, z: Tensor) -> Tensor:
        dim = channel_dim(layer.module)
        # In float32 where z is half precision: a small temperature would overflow.
        share = (z.float() / self.temperature).softmax(dim).to(z.dtype)
        if self.losers == "hebbian":
            return share
        return torch.where(_winners(z, 1, dim), share, -share)


@register_rule("winner")
class Winner(CompetitiveRule):
    """Hard competition: ``g = 1`` for the k largest outputs of each position, 0 for all others.

    With k = 1 the classic winner-take-all (Rumelhart and Zipser 1985) with a decay that holds the winner's norm: the
    limit of :class:`SoftHebb` with Hebbian losers at temperature 0.

    Args:
        k: winners of each position; >= 1. In a layer with fewer channels all of them win.
    """

    def __init__(self, seed: int = 0, *, k: int = 1, length: StepLength = "absolute", hold_norm: bool = False):
        super().__init__(seed, length=length, hold_norm=hold_norm)
        if k < 1:
            raise ValueError(f"localized.rule_options.k must be >= 1, got {k}")
        self.k = k

    def signal(self, layer: Layer, z: Tensor) -> Tensor:
        return _winners(z, self.k, channel_dim(layer.module)).to(z.dtype)


def _winners(z: Tensor, k: int, dim: int) -> Tensor:
    """Whether each output is among the k largest along ``dim``; exactly k are, also where outputs are equal."""
    best = z.topk(min(k, z.shape[dim]), dim).indices
    return torch.zeros_like(z, dtype=torch.bool).scatter_(dim, best, True)
