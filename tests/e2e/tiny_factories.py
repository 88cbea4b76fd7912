"""A data set and a network of one's own, named as ``package.module:factory`` by the end-to-end tests."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset


class Blobs(Dataset[tuple[Tensor, int]]):
    """Images whose class is the channel that is brightest: learnable, any size, made on the fly."""

    num_classes = 3

    def __init__(self, count: int, size: int, seed: int):
        self._count, self._size, self._seed = count, size, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(1000 * self._seed + index)
        image = torch.randint(0, 128, (3, self._size, self._size), generator=generator, dtype=torch.uint8)
        label = index % 3
        image[label] += 64
        return image, label


def blobs(split: str, size: int = 32, train: int = 12, val: int = 5) -> Blobs:
    return Blobs(train, size, 0) if split == "train" else Blobs(val, size, 1)


def small_vit(num_classes: int) -> nn.Module:
    """torchvision's vision transformer: fused attention, class token, positional embedding."""
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=num_classes
    )


def mlp(num_classes: int) -> nn.Module:
    """Without batch normalisation: data parallelism is exact."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, num_classes)
    )
