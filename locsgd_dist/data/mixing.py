"""MixUp and CutMix by torchvision, seeded by the step."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from locsgd_dist.data.hashing import hash64

_MIX_STREAM = 4


class Mixer:
    """Mixes the samples of a batch; the draw is a function of (seed, epoch, cursor, rank)."""

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, *, num_classes: int, seed: int, rank: int) -> None:
        transforms: list[v2.Transform] = []
        if mixup_alpha > 0:
            transforms.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha > 0:
            transforms.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        self._transform = v2.RandomChoice(transforms)
        self._key = (seed, rank)

    def __call__(self, images: Tensor, targets: Tensor, epoch: int, cursor: int) -> tuple[Tensor, Tensor]:
        """Images [b, 3, H, W] and classes [b] to mixed images and float32 targets [b, num_classes]."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash64(*self._key, epoch, cursor, _MIX_STREAM))
            return self._transform(images, targets)
