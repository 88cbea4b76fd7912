"""Localized rules: what stands in the place of the error at a layer's output, and how long a step is.

A rule turns what a forward pass of one layer has at hand (its input ``a`` and pre-activation output ``z``) into a
weight update. Rules are kept in a registry; ``register_rule`` adds one of your own:

    @register_rule("centred")
    class Centred(LocalizedRule):
        def signal(self, layer, z):
            return z - z.mean(dim=0)
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locsgd_dist.localized.layers import Layer

_TINY = torch.finfo(torch.float32).tiny


class LocalizedRule:
    """The paper's form of a rule: ``W <- W + step * dW / ||dW||``, ``dW = sum_z signal(z) (x) patch(a)`` (eqs. 3, 4).

    Subclasses override :meth:`signal` (another error in the same GEMM), :meth:`delta` (another update altogether) or
    :meth:`step` (another length of the step).
    """

    #: False: the localized region is left as it is; no hook runs.
    updates: bool = True
    #: Products of the size of the layer's forward pass that :meth:`delta` takes; only counts of operations read it.
    num_gemms: int = 1

    def __init__(self, seed: int = 0):
        self.seed = seed

    def signal(self, layer: Layer, z: Tensor) -> Tensor:
        """What stands in the place of the loss's gradient with respect to ``z``; same shape as ``z``."""
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

    def step(self, weights: list[Tensor], deltas: list[Tensor], size: float) -> None:
        """Moves every weight by ``size`` (a signed length) along its normalised update, in place (eq. 4).

        The norms stay on the device: nothing waits for them. A zero update leaves its layer where it is.
        """
        norms = torch._foreach_norm(deltas)
        torch._foreach_clamp_min_(norms, _TINY)
        torch._foreach_add_(weights, torch._foreach_div(deltas, norms), alpha=size)


_RULES: dict[str, type[LocalizedRule]] = {}


def register_rule(name: str) -> Callable[[type[LocalizedRule]], type[LocalizedRule]]:
    """Class decorator that makes a rule available as ``localized.rule=NAME``."""

    def register(rule: type[LocalizedRule]) -> type[LocalizedRule]:
        if _RULES.setdefault(name, rule) is not rule:
            raise ValueError(f"a localized rule named {name!r} is registered already")
        return rule

    return register


def rule_names() -> list[str]:
    return sorted(_RULES)


def make_rule(name: str, seed: int = 0) -> LocalizedRule:
    """The registered rule of that name, or the class that ``package.module:Class`` names.

    Raises:
        ValueError: no such rule; the message lists those there are.
    """
    module_name, colon, class_name = name.partition(":")
    if colon:
        return _imported_rule(module_name, class_name)(seed)
    if name not in _RULES:
        close = difflib.get_close_matches(name, _RULES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"localized.rule must be one of {', '.join(['none', *rule_names()])}, got {name!r}{hint}")
    return _RULES[name](seed)


def _imported_rule(module_name: str, class_name: str) -> type[LocalizedRule]:
    try:
        rule = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"localized.rule {module_name}:{class_name} cannot be imported: {error}") from None
    if not (isinstance(rule, type) and issubclass(rule, LocalizedRule)):
        raise ValueError(f"localized.rule {module_name}:{class_name} must be a class derived from LocalizedRule")
    return rule


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


def weight_gradient(module: nn.Module, a: Tensor, error: Tensor) -> Tensor:
    """The gradient of a convolution's or linear map's weight if ``error`` were the loss's gradient at its output.

    One GEMM (eq. 3 with ``error = z``). Dense, strided, dilated, padded, grouped and depthwise convolutions in one to
    three dimensions, batched or not, and linear maps on inputs of any number of dimensions.

    Args:
        module: a convolution (1d-3d) or linear module.
        a: its input; the dtype of ``error``.
        error: tensor of its output's shape.

    Returns:
        A float32 tensor of the weight's shape, in the weight's memory format where the backend gives it.
    """
    if error.dtype == torch.float16:
        # Half precision overflows where thousands of positions are summed. Both operands take half of the scale, so
        # that small values do not vanish instead; a power of two leaves the mantissa alone.
        positions = error.numel() // module.get_parameter("weight").shape[0]
        root = 2.0 ** -(-positions.bit_length() // 2)
        return _weight_gradient(module, a / root, error / root).float() * root**2
    return _weight_gradient(module, a, error).float()


def _weight_gradient(module: nn.Module, a: Tensor, error: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return error.flatten(0, -2).T @ a.flatten(0, -2) if a.dim() > 1 else torch.outer(error, a)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)), type(module)
    spatial = module.weight.dim() - 2
    if a.dim() == spatial + 1:
        a, error = a.unsqueeze(0), error.unsqueeze(0)
    padding: Sequence[int] = [0] * spatial
    if module.padding_mode != "zeros":
        a = F.pad(a, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif module.padding == "same":
        a = F.pad(a, module._reversed_padding_repeated_twice)
    elif module.padding != "valid":
        padding = module.padding  # type: ignore[assignment]
    return torch.ops.aten.convolution_backward(
        error,
        a,
        module.weight.to(error.dtype),
        None,
        module.stride,
        padding,
        module.dilation,
        False,
        [0] * spatial,
        module.groups,
        [False, True, False],
    )[1]
