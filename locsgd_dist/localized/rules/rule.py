"""What every localized rule is: an update from a layer's input and output, and a step along it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from locsgd_dist.localized.layers import Layer
from locsgd_dist.localized.rules.products import weight_gradient

_TINY = torch.finfo(torch.float32).tiny
_LEAST_NORM = 1e-30

StepLength = Literal["absolute", "layer", "filter"]


class LocalizedRule:
    """The paper's form of a rule: ``W <- W + step * dW / ||dW||``, ``dW = sum_z signal(z) (x) patch(a)`` (eqs. 3, 4).

    Subclasses override :meth:`signal` (another error in the same GEMM), :meth:`delta` (another update altogether) or
    :meth:`step` (another length of the step). Keyword arguments of a subclass's constructor are its options: they can
    be set from a configuration (``localized.rule_options``), checked against their annotations.

    Args:
        seed: of rules that draw random numbers.
        length: what the step's length eta is relative to. absolute: nothing, each layer moves by eta (eq. 4); layer:
            the norm of the layer's weight; filter: the norm of each output channel's filter, which moves by eta of it
            along its own part of the update.
        hold_norm: after the step each filter gets back the norm that it had before.
    """

    #: False: the localized region is left as it is; no hook runs.
    updates: bool = True
    #: Products of the size of the layer's forward pass that :meth:`delta` takes; only counts of operations read it.
    num_gemms: int = 1

    def __init__(self, seed: int = 0, *, length: StepLength = "absolute", hold_norm: bool = False):
        self.seed = seed
        self.length = length
        self.hold_norm = hold_norm

    def signal(self, layer: Layer, z: Tensor) -> Tensor:
        """What stands in the place of the loss's gradient with respect to ``z``; same shape and dtype as ``z``."""
        return z

    def delta(self, layer: Layer, a: Tensor, z: Tensor, step: Tensor) -> Tensor:
        """Weight update of one layer for one batch, summed over samples and positions.

        Args:
            layer: the layer; its weight must not require a gradient.
            a: the layer's input, in the dtype of ``z``.
            z: its output before any non-linearity.
            step: number of updates applied so far, for rules that draw random numbers: an int64 scalar on the CPU (a
                plain number would be compiled into the graph of a compiled network, anew for each step).

        Returns:
            A tensor of the weight's shape in float32.
        """
        return weight_gradient(layer.module, a, self.signal(layer, z))

    def macs(self, layer: Layer, num_samples: int) -> int:
        """Multiply-adds of one :meth:`delta` on ``num_samples``: a multiple of them, plus what a batch costs once.

        Only counts of operations read it. The default is ``num_gemms`` times the layer's forward pass.
        """
        return num_samples * self.num_gemms * layer.macs

    def step(self, weights: list[Tensor], deltas: list[Tensor], size: float) -> None:
        """Moves every weight by ``size`` (a signed length) along its normalised update, in place (eq. 4).

        The norms stay on the device: nothing waits for them. A zero update leaves its layer where it is. Each layer's
        step is a function of its own weight and update.
        """
        if self.length == "absolute" and not self.hold_norm:
            # One pass over the weights: the quotient is taken of scalars, and stays finite for any size below 1e8.
            scales = [size / norm.clamp_min(_LEAST_NORM) for norm in torch._foreach_norm(deltas)]
            torch._foreach_addcmul_(weights, deltas, scales)
            return
        for weight, delta in zip(weights, deltas, strict=True):
            before = _filter_norms(weight)
            norm = _filter_norms(delta) if self.length == "filter" else torch.linalg.vector_norm(delta)
            # Divided first: a quotient of norms could overflow where the update is zero.
            move = delta / norm.clamp_min(_TINY) * size
            if self.length != "absolute":
                move *= before if self.length == "filter" else torch.linalg.vector_norm(before)
            weight.add_(move)
            if self.hold_norm:
                weight.mul_(before / _filter_norms(weight).clamp_min(_TINY))


def _filter_norms(weight: Tensor) -> Tensor:
    """[channels, 1, ...] norm of each output channel's filter, in float32 or the weight's wider type."""
    dims = tuple(range(1, weight.dim()))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True, dtype=dtype)
