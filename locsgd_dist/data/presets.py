"""The ImageNet pipelines, per sample and on the undecoded original, of torchvision's transforms v2."""

from __future__ import annotations

from typing import Literal

import torch
from torchvision.transforms import InterpolationMode, v2

from locsgd_dist.data.augment import Normalization

ImageNetPreset = Literal["imagenet_paper", "imagenet_torchvision"]

_EVAL_RESIZE = {"imagenet_paper": 256 / 224, "imagenet_torchvision": 232 / 224}


def train_transform(preset: ImageNetPreset, size: int, normalization: Normalization) -> v2.Transform:
    """Random resized crop and flip; torchvision's reference recipe adds TrivialAugment and random erasing (0.1).

    The result is a uint8 [C, size, size] tensor: a quarter of what floats would cost on the way to the device.
    Random erasing, which fills with the mean, therefore fills with the nearest integer to it.
    """
    crop_and_flip: list[torch.nn.Module] = [
        v2.RandomResizedCrop(size, interpolation=InterpolationMode.BILINEAR, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if preset == "imagenet_paper":
        return v2.Compose([*crop_and_flip, v2.PILToTensor()])
    fill = [float(round(255 * mean)) for mean in normalization.mean]
    return v2.Compose(
        [
            *crop_and_flip,
            v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
            v2.PILToTensor(),
            v2.RGB(),
            v2.RandomErasing(p=0.1, value=fill),
        ]
    )


def eval_transform(preset: ImageNetPreset, size: int) -> v2.Transform:
    """Shorter side to size * 256/224 (torchvision's recipe: 232/224), then the centre; uint8 [C, size, size]."""
    return v2.Compose(
        [
            v2.Resize(round(size * _EVAL_RESIZE[preset]), antialias=True),
            v2.CenterCrop(size),
            v2.PILToTensor(),
        ]
    )
