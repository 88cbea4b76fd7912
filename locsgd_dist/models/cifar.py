"""The paper's CIFAR networks: ResNet-18 (21 layers) and VGG-13 (11 layers) for 32x32 images, of any width.

torchvision's networks of these names are made for 224x224; these differ in the stem and the head only, are
put together from torchvision's blocks and carry its parameter names (``layer2.0.downsample.0.weight``,
``features.3.weight``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers


class CifarResNet(nn.Module):
    """A ResNet of basic blocks behind a 3x3 stem without pooling.

    Maps images ``[N, 3, H, W]`` to logits ``[N, num_classes]``; 32x32 images reach the last stage as 4x4.

    Args:
        blocks: blocks in each of the four stages; stage ``i`` has ``width * 2**i`` channels.
        num_classes: outputs of the classifier.
        width: channels of the stem and of the first stage.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarVGG(nn.Module):
    """VGG's configuration B (VGG-13) with batch norm and a single linear layer as classifier.

    Maps images ``[N, 3, H, W]``, 32x32 or larger, to logits ``[N, num_classes]``.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        stages = (width, 2 * width, 4 * width, 8 * width, 8 * width)
        self.features = make_layers([c for s in stages for c in (s, s, "M")], batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, num_classes)
        _init_convolutions(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def resnet18(num_classes: int, width: int = 64) -> CifarResNet:
    """The CIFAR ResNet-18: 20 convolutions (3 of them shortcuts) and a classifier."""
    return CifarResNet((2, 2, 2, 2), num_classes, width)


def vgg13(num_classes: int, width: int = 64) -> CifarVGG:
    """The CIFAR VGG-13 with batch norm: 10 convolutions and a classifier."""
    return CifarVGG(num_classes, width)


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(channels),
        )
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(num_blocks - 1)))


def _init_convolutions(model: nn.Module) -> None:
    """He initialisation by fan-out, as torchvision's ResNet and VGG; norms are born at 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
