"""What the method can save at most, network by network: the published table of layers, FLOPs and freed activations.

The networks are the real ones at their real image sizes, on the meta device: no arithmetic is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from locsgd_dist.localized import Layer, LocalizedLearner
from locsgd_dist.models import resnet18, vgg13


@dataclass(frozen=True)
class Row:
    builder: Callable[[], nn.Module]
    side: int
    layers: int
    boundaries: tuple[int, int]
    """50 % and 75 % of the layers (of VGG-13's convolutions)."""
    flops: tuple[float, float]
    freed: tuple[float, float]


TABLE = {
    "ResNet-18 (CIFAR)": Row(lambda: resnet18(10), 32, 21, (10, 15), (0.52, 0.76), (0.74, 0.91)),
    "VGG-13 (CIFAR)": Row(lambda: vgg13(10), 32, 11, (5, 7), (0.50, 0.75), (0.79, 0.92)),
    "ResNet-34": Row(torchvision.models.resnet34, 224, 37, (18, 27), (0.51, 0.76), (0.76, 0.90)),
    "ResNet-50": Row(torchvision.models.resnet50, 224, 54, (27, 40), (0.51, 0.75), (0.74, 0.89)),
    "MobileNetV2": Row(torchvision.models.mobilenet_v2, 224, 53, (26, 39), (0.45, 0.70), (0.80, 0.93)),
}


def kept_input_bytes(model: nn.Module, layers: list[Layer], x: Tensor) -> int:
    """Bytes of layer inputs that layers themselves save for their backward pass."""
    kept = 0
    running: Tensor | None = None

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal running
        running = args[0]

    def end(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal running
        running = None

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if running is not None and tensor.untyped_storage()._cdata == running.untyped_storage()._cdata:
            kept += running.numel() * running.element_size()
        return tensor

    handles = [layer.module.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.module.register_forward_hook(end) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("name", TABLE)
def test_shares_of_flops_and_of_freed_layer_inputs(name: str) -> None:
    row = TABLE[name]
    with torch.device("meta"):
        model = row.builder().train()
        x = torch.zeros(2, 3, row.side, row.side)
    learner = LocalizedLearner(model, x, rule="frozen")
    assert len(learner.layers) == row.layers
    macs = [layer.macs for layer in learner.layers]
    whole = kept_input_bytes(model, list(learner.layers), x)
    assert whole > 0
    for boundary, flops, freed in zip(row.boundaries, row.flops, row.freed, strict=True):
        assert sum(macs[:boundary]) / sum(macs) == pytest.approx(flops, abs=0.0051)
        learner.advance(boundary)
        assert 1 - kept_input_bytes(model, list(learner.layers), x) / whole == pytest.approx(freed, abs=0.0051)
