"""The layers of a network in the order in which one forward pass runs them, and who owns each parameter.

A *layer* is a module with a weight that a forward pass multiplies its input with: a convolution, a linear map, an
attention. Layers are numbered 0 ... L-1 in execution order, so that every prefix ``0 ... T-1`` can stop receiving
gradients without any layer after it depending on one inside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_PLAIN_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
#: Modules that count as one layer but whose weight gradient with respect to a pre-activation output is not a single
#: GEMM of what their forward hook sees: a localized rule leaves them as they are (they are frozen).
_OPAQUE_LAYERS = (
    nn.MultiheadAttention,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_LAYER_TYPES = (*_PLAIN_LAYERS, *_OPAQUE_LAYERS)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer and what belongs to it.

    Attributes:
        index: position in execution order, from 0.
        name: qualified module name in the network.
        module: the convolution, linear map or attention.
        parameters: qualified name and tensor of every parameter that the layer owns: its own, then those of the
            normalisations and loose parameters first used after it.
        macs: multiply-adds of one forward pass per sample (0 where the module is opaque).
        norms: modules with running statistics (batch norms) that run after this layer and before the next.
    """

    index: int
    name: str
    module: nn.Module
    parameters: tuple[tuple[str, nn.Parameter], ...]
    macs: int = 0
    norms: tuple[nn.Module, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The tensor that diagnostics and localized rules speak of: the weight, or the layer's largest parameter."""
        weight = self.module._parameters.get("weight")
        return max(self.module.parameters(), key=lambda parameter: parameter.numel()) if weight is None else weight

    @property
    def updatable(self) -> bool:
        """Whether a localized rule can update it: a convolution or linear map whose weight is a plain parameter.

        A subclass with a forward of its own (one that pads or standardises by itself) has another ``z`` and stays as
        it is.
        """
        kind = type(self.module)
        is_plain = any(
            kind.forward is plain.forward
            and getattr(kind, "_conv_forward", None) is getattr(plain, "_conv_forward", None)
            for plain in _PLAIN_LAYERS
        )
        return is_plain and "weight" in self.module._parameters


@dataclass(frozen=True)
class LayerMap(Sequence[Layer]):
    """The layers of a network in execution order; indexable, ``len()`` is L."""

    layers: tuple[Layer, ...]
    block_size: int = field(default=1)
    """Layers of one recurring block (2 for a basic residual block, 3 for a bottleneck, 1 where nothing recurs)."""

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def parameters(self, start: int = 0, stop: int | None = None) -> dict[str, nn.Parameter]:
        """Parameters owned by layers ``start <= l < stop``, by qualified name."""
        return dict(pair for layer in self.layers[start:stop] for pair in layer.parameters)


def trace_layers(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> LayerMap:
    """Runs ``model`` once on ``example_input`` and numbers its layers in the order in which they ran.

    The pass runs in evaluation mode without gradients: buffers and random state stay as they are.

    Args:
        model: any network that runs on ``example_input``; it is not changed.
        example_input: a batch (one sample is enough), or the tuple of positional arguments of ``forward``.

    Raises:
        ValueError: the network has no layer; a layer or a layer's weight is used twice in a pass (its input would
            have to be two things at once); a parameter is used by nothing, so that nothing owns it.
    """
    trace = _Trace(model)
    trace.run(example_input)
    return LayerMap(trace.owned_layers(), _block_size(model, trace.order))


class _FirstUse(TorchFunctionMode):
    """Tells ``seen`` of every parameter that a tensor-valued torch call takes as an argument."""

    def __init__(self, seen: Callable[[nn.Parameter], None]):
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading `.shape` or `.dtype` of a parameter uses no value of it; only calls that return tensors count.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter):
                    self._seen(leaf)
        return result


class _Trace:
    def __init__(self, model: nn.Module):
        self.model = model
        self.order: list[nn.Module] = []
        self.macs: dict[nn.Module, int] = {}
        self._runs: Counter[nn.Module] = Counter()
        self._samples = 1
        self._last_layer_before: dict[nn.Parameter, int] = {}
        self._norm_after: dict[nn.Module, int] = {}
        self._names = {module: name for name, module in model.named_modules()}
        inside_opaque = {
            child
            for module in model.modules()
            if isinstance(module, _OPAQUE_LAYERS)
            for child in module.modules()
            if child is not module
        }
        self._layer_modules = [m for m in model.modules() if isinstance(m, _LAYER_TYPES) and m not in inside_opaque]

    def run(self, example_input: Tensor | tuple[Any, ...]) -> None:
        args = example_input if isinstance(example_input, tuple) else (example_input,)
        self._samples = next((a.shape[0] for a in tree_leaves(args) if isinstance(a, Tensor) and a.dim() > 0), 1)
        training = {module: module.training for module in self.model.modules()}
        handles = [m.register_forward_hook(self._ran) for m in self._layer_modules]
        handles += [m.register_forward_hook(self._norm_ran) for m in self.model.modules() if isinstance(m, _NormBase)]
        self.model.eval()
        try:
            with torch.no_grad(), _FirstUse(self._used):
                self.model(*args)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode
        self._refuse_shared_layers()

    def _ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._runs[module] += 1
        if module in self.macs:
            return
        self.order.append(module)
        self.macs[module] = 0
        if isinstance(module, _PLAIN_LAYERS):
            # Not divided by this layer's own first dimension: a network may fold windows or frames into the batch.
            positions = output.numel() // module.weight.shape[0]
            self.macs[module] = positions * module.weight.numel() // self._samples

    def _norm_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._norm_after.setdefault(module, max(0, len(self.order) - 1))

    def _used(self, parameter: nn.Parameter) -> None:
        self._last_layer_before.setdefault(parameter, len(self.order) - 1)

    def _refuse_shared_layers(self) -> None:
        if not self.order:
            raise ValueError("the network has no convolution or linear layer that runs on the example input")
        for module, runs in self._runs.items():
            if runs > 1:
                raise ValueError(
                    f"layer {self._names[module]!r} runs {runs} times in one forward pass: a layer shared between "
                    "places cannot be given to the localized region; give each place a module of its own"
                )

    def owned_layers(self) -> tuple[Layer, ...]:
        position = {module: index for index, module in enumerate(self.order)}
        owned: list[list[tuple[str, nn.Parameter]]] = [[] for _ in self.order]
        owner: dict[nn.Parameter, nn.Module] = {}
        for module in self.order:
            for name, parameter in module.named_parameters(prefix=self._names[module]):
                if owner.setdefault(parameter, module) is not module:
                    raise ValueError(
                        f"layers {self._names[owner[parameter]]!r} and {self._names[module]!r} share the parameter "
                        f"{name!r}: tied weights have no single place in the execution order; untie them"
                    )
                if self._last_layer_before.get(parameter, position[module]) < position[module] - 1:
                    raise ValueError(
                        f"parameter {name!r} is used before its layer {self._names[module]!r} runs: tied weights have "
                        "no single place in the execution order; untie them"
                    )
                owned[position[module]].append((name, parameter))
        orphans = []
        for name, parameter in self.model.named_parameters():
            if parameter in owner:
                continue
            if parameter not in self._last_layer_before:
                orphans.append(name)
                continue
            owned[max(0, self._last_layer_before[parameter])].append((name, parameter))
        if orphans:
            shown = ", ".join(orphans[:5]) + (f" and {len(orphans) - 5} more" if len(orphans) > 5 else "")
            raise ValueError(
                f"parameters used by no forward pass on the example input have no owner: {shown}; "
                "remove the unused modules"
            )
        norms: list[list[nn.Module]] = [[] for _ in self.order]
        for norm, index in self._norm_after.items():
            norms[index].append(norm)
        return tuple(
            Layer(index, self._names[module], module, tuple(owned[index]), self.macs[module], tuple(norms[index]))
            for index, module in enumerate(self.order)
        )


def _block_size(model: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Layers in one recurring block: the class of module with the most instances that hold two or more layers each.

    Of classes with equally many instances the one that covers more layers is the block (a transformer's encoder block
    rather than the MLP inside it). Containers say nothing of a network's structure and do not count.
    """
    layer_set = set(layers)
    sizes: dict[type, list[int]] = {}
    for module in model.modules():
        if module is model or module in layer_set or isinstance(module, _CONTAINERS):
            continue
        size = sum(1 for child in module.modules() if child in layer_set)
        if size >= 2:
            sizes.setdefault(type(module), []).append(size)
    recurring = {kind: found for kind, found in sizes.items() if len(found) >= 2}
    covering = [found for found in recurring.values() if 2 * sum(found) >= len(layers)]
    if not covering:
        return 1
    block = max(covering, key=lambda found: (len(found), sum(found)))
    return Counter(block).most_common(1)[0][0]
