"""A data set of one's own for the tests of configurations: a dozen 32x32 images of ten classes, made on the fly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset


class SmallImages(Dataset[tuple[Tensor, int]]):
    """Random uint8 images."""

    num_classes = 10

    def __init__(self, split: str):
        self._images = torch.randint(0, 256, (8 if split == "train" else 4, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], index % 10
