"""The ImageNet pipelines, per sample and on the undecoded original, of torchvision's transforms v2."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from locsgd_dist.data.items import Picture
from locsgd_dist.data.normalization import Normalization

ImageNetPreset = Literal["imagenet_paper", "imagenet_torchvision"]

_EVAL_SIDE = {"imagenet_paper": 256, "imagenet_torchvision": 232}


class ToRGB(v2.Transform):
    """Grey to three channels. Raises ValueError for float pictures, which are taken as normalised already."""

    def forward(self, picture: Picture) -> Picture:
        if isinstance(picture, Tensor) and picture.is_floating_point():
            raise ValueError("data.augmentation=imagenet_* needs PIL or uint8 images, got floats")
        return functional.grayscale_to_rgb(picture)


def train_transform(preset: ImageNetPreset, size: int, normalization: Normalization) -> v2.Transform:
    """Random resized crop and flip; as torchvision's reference recipe also TrivialAugment and random erasing.

    The result is uint8 [3, size, size]: a quarter of what floats would cost on the way to the device. Random
    erasing, which is to fill with the mean, therefore fills with the integer nearest to it.
    """
    crop: list[v2.Transform] = [ToRGB(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if preset == "imagenet_paper":
        return v2.Compose([*crop, v2.PILToTensor()])
    return v2.Compose(
        [
            *crop,
            v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
            v2.PILToTensor(),
            v2.RandomErasing(p=0.1, value=[float(round(255 * mean)) for mean in normalization.mean]),
        ]
    )


def eval_transform(preset: ImageNetPreset, size: int) -> v2.Transform:
    """Shorter side to size * 256/224 (torchvision's recipe: 232/224), then the centre: uint8 [3, size, size]."""
    shorter_side = round(size * _EVAL_SIDE[preset] / 224)
    return v2.Compose([ToRGB(), v2.Resize(shorter_side, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
