"""What the `data` section leaves to the data set, decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from locsgd_dist.data.augment import CropFlip
from locsgd_dist.data.config import Augmentation, DataConfig
from locsgd_dist.data.normalization import NORMALIZATIONS, Normalization
from locsgd_dist.data.presets import ImageNetPreset
from locsgd_dist.data.sources import Source

AUTO_IN_MEMORY_BYTES = 2 << 30
"""Up to here `data.in_memory=auto` holds a set on the device. A constant, so that all ranks decide alike."""

SMALL_SIDE = 64
"""Images up to this side are used whole, shifted and mirrored; larger ones are cropped out of."""


@dataclass(frozen=True)
class Recipe:
    """How samples become the network's input."""

    size: int
    """Side of the input in pixels."""

    in_memory: bool
    normalization: Normalization

    preset: ImageNetPreset | None
    """Augmentation of undecoded originals, by workers."""

    crop_flip: CropFlip | None
    """Augmentation of decoded batches, on the device."""


def resolve(config: DataConfig, source: Source) -> Recipe:
    """Decide size, place, normalisation and augmentation.

    Raises:
        ValueError: where `data.in_memory=true` meets an augmentation that needs the originals.
    """
    size = config.image_size or source.image_size
    augmentation = resolve_augmentation(
        config, size, photographs=source.photographs, self_augmenting=source.self_augmenting
    )
    preset = cast(ImageNetPreset, augmentation) if augmentation.startswith("imagenet_") else None
    num_bytes = ((config.train_samples or len(source.train)) + len(source.val)) * 3 * size**2
    fits = num_bytes <= AUTO_IN_MEMORY_BYTES and not source.self_augmenting
    return Recipe(
        size,
        in_memory=preset is None and (fits if config.in_memory == "auto" else config.in_memory),
        normalization=(
            source.normalization if config.normalization == "auto" else NORMALIZATIONS[config.normalization]
        ),
        preset=preset,
        crop_flip=_crop_flip(augmentation, source, size),
    )


def resolve_augmentation(config: DataConfig, size: int, *, photographs: bool, self_augmenting: bool) -> Augmentation:
    """`data.augmentation`, with auto resolved for images of `size` pixels of such a set.

    Raises:
        ValueError: where `data.in_memory=true` meets an augmentation that needs the originals.
    """
    augmentation = config.augmentation
    if augmentation == "auto":
        if self_augmenting:
            augmentation = "none"
        elif size <= SMALL_SIDE or not photographs:
            augmentation = "crop_flip"
        else:
            augmentation = "imagenet_paper"
    if augmentation.startswith("imagenet_") and config.in_memory is True:
        raise ValueError(
            f"data.in_memory=true needs data.augmentation none, crop_flip or crop_flip_cutout, "
            f"got {config.augmentation}, which for images of {size} pixels is {augmentation}"
        )
    return augmentation


def _crop_flip(augmentation: Augmentation, source: Source, size: int) -> CropFlip | None:
    if not augmentation.startswith("crop_flip"):
        return None
    return CropFlip(
        padding=size // 8 if source.photographs else size // 16,
        flip=source.photographs,
        cutout=round(size * source.cutout) if augmentation == "crop_flip_cutout" else 0,
    )
