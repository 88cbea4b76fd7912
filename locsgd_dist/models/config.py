"""The ``model`` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The network to train and the weights it starts from."""

    name: str = "resnet18"
    """A bare name is one of the paper's networks: `resnet18`, `vgg13` (CIFAR, 32x32), `resnet34`, `resnet50`,
    `mobilenet_v2` (ImageNet). `torchvision:NAME` and `timm:NAME` take any classifier of those libraries;
    `package.module:factory` is called as `factory(num_classes=C, **model.kwargs)`."""

    width: int | None = None
    """Channels of the first stage of `resnet18` and `vgg13`: 64 in the paper and if not given.
    Other networks take no width."""

    weights: str | None = None
    """Weights to start from: none, `DEFAULT` (the pretrained ones of torchvision or timm, downloaded once) or
    the path of a state_dict (`.pt`, `.pth`, `.safetensors`). A head for other classes is replaced."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the network's constructor."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("model.name must name a network, got an empty string")
        if self.width is not None and self.width < 1:
            raise ValueError(f"model.width must be at least 1, got {self.width}")
        if self.weights == "":
            raise ValueError("model.weights must be DEFAULT, a path or null, got an empty string")
        if "num_classes" in self.kwargs:
            raise ValueError("model.kwargs must not contain num_classes: the data set determines it")
