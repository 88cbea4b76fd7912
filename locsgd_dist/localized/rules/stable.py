"""Rules that keep what the plain Hebbian rule loses: the filters' norm, or the rank of the weight.

``y = z - bias`` is the response of the weight alone, ``(x)`` the product of an output with the patch of input that it
was made from, summed over samples and positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locsgd_dist.localized.layers import Layer
from locsgd_dist.localized.rules.products import (
    along_channels,
    channel_dim,
    output_products,
    response,
    sum_positions,
    weight_gradient,
)
from locsgd_dist.localized.rules.registry import register_rule
from locsgd_dist.localized.rules.rule import LocalizedRule, StepLength


@register_rule("hebbian_relative")
class HebbianRelative(LocalizedRule):
    """The Hebbian rule on the sphere: each filter moves by eta of its own norm and keeps that norm.

    ``w_c <- ||w_c|| * u / ||u||`` with ``u = w_c + eta * ||w_c|| * dw_c / ||dw_c||``. Norms cannot grow or vanish; that
    all filters turn towards one direction it does not prevent.
    """

    def __init__(self, seed: int = 0, *, length: StepLength = "filter", hold_norm: bool = True):
        super().__init__(seed, length=length, hold_norm=hold_norm)


@register_rule("centred")
class Centred(LocalizedRule):
    """Covariance in the place of correlation: ``dW = sum (z - mean z) (x) (patch(a) - mean patch)``.

    Means are over the batch's samples and positions. The mean patch need not be known: against a centred output every
    constant sums to zero, so that centring ``z`` alone gives the same sum in one GEMM. The mean input, which is the
    direction that activations behind a ReLU share, has no say then.
    """

    def signal(self, layer: Layer, z: Tensor) -> Tensor:
        module = layer.module
        positions = z.numel() // z.shape[channel_dim(module)]
        mean = sum_positions(module, z) / positions
        return z - along_channels(module, mean).to(z.dtype)


@register_rule("oja")
class OjaSubspace(LocalizedRule):
    """Oja's subspace rule: ``dW = sum y (x) patch(a) - (sum y y^T) W``, within each group of a grouped convolution.

    E. Oja, "Neural networks, principal components, and subspaces", Int. J. of Neural Systems 1(1), 1989. The symmetric
    form: no output comes before another, as they do in Sanger's rule. With small plain steps the rows of W become an
    orthonormal basis of the inputs' principal subspace: norm 1 each, rank kept, where the plain rule has all rows turn
    towards the first component. The decay is what the other outputs explain already: ``dW = y (x) (a - W^T y)``.

    Cost: the Hebbian product, one of outputs with outputs, and one with the weight in each batch.
    """

    def signal(self, layer: Layer, z: Tensor) -> Tensor:
        return response(layer.module, z)

    def delta(self, layer: Layer, a: Tensor, z: Tensor, step: Tensor) -> Tensor:
        y = self.signal(layer, z)
        hebbian = weight_gradient(layer.module, a, y)
        products = output_products(layer.module, y)
        by_group = (*products.shape[:2], -1)
        weight = layer.weight.detach().float().reshape(by_group)
        return torch.baddbmm(hebbian.reshape(by_group), products, weight, alpha=-1).view(hebbian.shape)

    def macs(self, layer: Layer, num_samples: int) -> int:
        weight = layer.weight
        positions = layer.macs // weight.numel()
        channels_of_group = weight.shape[0] // getattr(layer.module, "groups", 1)
        of_outputs = positions * weight.shape[0] * channels_of_group
        return num_samples * (layer.macs + of_outputs) + channels_of_group * weight.numel()
