"""Channels cut out of a network, so that it becomes physically smaller; `torch-pruning` knows which belong together.

The cut is first made on a copy whose every number is its own position. What is left there says which numbers of any
tensor of the same shape stay: of weights, running statistics, averaged weights and momentum alike. Parameters keep
their identity, so that whoever refers to one goes on referring to it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Surgery:
    """What a cut keeps.

    Attributes:
        positions: by name of parameter or buffer that lost something: int64, of the new shape; positions in the old
            tensor, flattened. On the CPU.
        removed_channels: channels cut out, coupled ones counted once.
    """

    positions: Mapping[str, Tensor]
    removed_channels: int

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of ``tensor``, which has the old shape of parameter or buffer ``name``; else the tensor."""
        positions = self.positions.get(name)
        if positions is None:
            return tensor
        left = tensor.flatten()[positions.to(tensor.device)]
        if tensor.dim() == 4 and not tensor.is_contiguous():
            left = left.contiguous(memory_format=torch.channels_last)
        return left

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Cuts ``model``; its parameters and buffers stay the same objects. A DDP wrapper must be made anew."""
        for name, tensor in _tensors(model).items():
            if name in self.positions:
                tensor.grad = None
                tensor.data = self.cut(name, tensor.detach())
        _update_attributes(model)


class ChannelGroups:
    """The channels of a network that can only be removed together: of a layer, its norm, the layers that read it, and
    all layers that a shortcut adds it to.

    Args:
        model: the network; it is not changed.
        example_input: a batch that it runs on.
        keep_outputs: names of layers whose output channels stay (the classifier).

    Raises:
        ValueError: the network has modules that this does not know how to cut.
    """

    def __init__(self, model: nn.Module, example_input: Tensor, keep_outputs: Sequence[str]):
        import torch_pruning

        check_prunable(model)
        self._model = model
        self._twin = copy.deepcopy(model).cpu().float().eval().requires_grad_()
        self._graph: Any = torch_pruning.DependencyGraph()
        with torch.enable_grad():  # the graph is read off autograd's
            self._graph.build_dependency(self._twin, example_input.detach().cpu().float(), verbose=False)
        kept = [self._twin.get_submodule(name) for name in keep_outputs]
        self._groups = list(self._graph.get_all_groups(ignored_layers=kept))

    @torch.no_grad()
    def magnitudes(self) -> list[Tensor]:
        """For each group, the largest absolute weight of each channel over all convolutions and linear maps that write
        or read it."""
        found = []
        for group in self._groups:
            largest = torch.zeros(len(group[0].idxs))
            for item in group.items:
                layer = item.dep.target.module
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    writes = self._graph.is_out_channel_pruning_fn(item.dep.handler)
                    weight = layer.weight.abs() if writes else layer.weight.abs().transpose(0, 1)
                    channels = weight.flatten(1).amax(dim=1)[torch.tensor(item.idxs)]
                    largest.scatter_reduce_(0, torch.tensor(item.root_idxs), channels, "amax")
            found.append(largest)
        return found

    @torch.no_grad()
    def remove(self, channels: Sequence[Sequence[int]]) -> Surgery:
        """The cut that removes ``channels[g]`` of group ``g``. It can be asked for once: the copy is used up.

        Removing all channels of a group is not allowed.
        """
        for tensor in _tensors(self._twin).values():
            # Doubles hold any position exactly.
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        for group, indices in zip(self._groups, channels, strict=True):
            if indices:
                group.prune(list(indices))
        left = _tensors(self._twin)
        positions = {
            name: left[name].detach().long()
            for name, tensor in _tensors(self._model).items()
            if left[name].shape != tensor.shape
        }
        return Surgery(positions, sum(len(indices) for indices in channels))


def check_prunable(model: nn.Module) -> None:
    """Checks that every parameter sits in a module that can be cut.

    Raises:
        ValueError: one line that names the first module that cannot, or the package that is missing.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        raise ValueError("pruning.every_epochs > 0 needs the pruning extra: pip install 'locsgd-dist[pruning]'")
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        known = isinstance(module, (nn.Linear, _BatchNorm)) or (
            isinstance(module, nn.Conv2d) and (module.groups == 1 or is_depthwise(module))
        )
        if own and not known:
            kind = "grouped convolution" if isinstance(module, nn.Conv2d) else type(module).__name__
            raise ValueError(
                "pruning.every_epochs > 0 needs a network of plain or depthwise convolutions, batch norms and linear "
                f"layers; {name or 'the network itself'} is a {kind}"
            )


def is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


@torch.no_grad()
def adopt_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Gives a plain network the shapes of a pruned one, whose weights can then be loaded. Values are lost where shapes
    differ.

    Args:
        shapes: by name of parameter or buffer.
    """
    for name, tensor in _tensors(model).items():
        if name in shapes and tensor.shape != torch.Size(shapes[name]):
            tensor.grad = None
            tensor.data = tensor.new_zeros(tuple(shapes[name]))
            if tensor.dim() == 4 and not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    _update_attributes(model)


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter and buffer, by name."""
    return {name: list(tensor.shape) for name, tensor in _tensors(model).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _update_attributes(model: nn.Module) -> None:
    """Makes the channel counts that modules keep agree with their weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            depthwise = is_depthwise(module)
            module.out_channels = module.weight.shape[0]
            module.in_channels = module.out_channels if depthwise else module.weight.shape[1] * module.groups
            module.groups = module.out_channels if depthwise else module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, _BatchNorm):
            statistics = module.running_mean if module.weight is None else module.weight
            if statistics is not None:
                module.num_features = len(statistics)
