"""Networks that the tests of localized learning share: every family a layer map must cope with, as small as it goes."""

from __future__ import annotations

from collections.abc import Callable

import timm.models.swin_transformer
import timm.models.vision_transformer
import torch
import torchvision.models
from torch import Tensor, nn

from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.models import resnet18, vgg13
from locsgd_dist.models.cifar import CifarResNet


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )


def timm_vision_transformer() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )


def timm_swin() -> nn.Module:
    """Folds its windows into the batch dimension before its linear maps."""
    return timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=10
    )


def sequence_network() -> nn.Module:
    """1d: dense, strided and grouped convolutions over 3 channels of any length."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding="same"),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Conv1d(8, 8, 3, stride=2, groups=4),
        nn.GroupNorm(2, 8),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def volume_network() -> nn.Module:
    """3d: a dense and a depthwise convolution over 3 channels."""
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.Conv3d(4, 4, 3, groups=4, bias=False),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


class PlainConvolutions(nn.Module):
    """Three convolutions and a classifier without batch norm: nothing in it depends on the rest of the batch.

    Its first activation works in place on the first convolution's output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, stride=2, groups=2)
        self.conv3 = nn.Conv2d(6, 8, 1, bias=False)
        self.fc = nn.Linear(8, 10)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        x = self.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))


#: Name -> (builder, shape of one sample). Spatial sizes are the least that leaves batch norm two values a channel.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cifar_resnet18": (lambda: resnet18(10, width=4), (3, 32, 32)),
    "cifar_vgg13": (lambda: vgg13(10, width=4), (3, 32, 32)),
    "resnet34": (lambda: CifarResNet((3, 4, 6, 3), 10, width=4), (3, 32, 32)),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10, width_per_group=8), (3, 32, 32)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25), (3, 32, 32)),
    "vision_transformer": (vision_transformer, (3, 32, 32)),
    "timm_vision_transformer": (timm_vision_transformer, (3, 32, 32)),
    "timm_swin": (timm_swin, (3, 32, 32)),
    "sequence": (sequence_network, (3, 16)),
    "volume": (volume_network, (3, 6, 6, 6)),
    "plain": (PlainConvolutions, (3, 8, 8)),
}


def build(name: str, batch: int = 4, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network of :data:`NETWORKS` in training mode and a batch for it, both drawn from ``seed``."""
    builder, shape = NETWORKS[name]
    torch.manual_seed(seed)
    return builder().train(), torch.randn(batch, *shape)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A cross-entropy with fixed targets; dropout draws the same numbers in each call."""
    torch.manual_seed(1)
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10)


def plain_learner(boundary: int = 2, **options: object) -> tuple[PlainConvolutions, LocalizedLearner, Tensor]:
    model, x = build("plain")
    learner = LocalizedLearner(model, x[:1], **options)  # type: ignore[arg-type]
    learner.advance(boundary)
    return model, learner, x  # type: ignore[return-value]
