"""Batched augmentation on the device: pad, crop, flip and cutout, then normalisation, of uint8 images.

Everything random is a hash of (seed, epoch, sample index), see `hashing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locsgd_dist.data.hashing import coin, hash_indices, uniform_int

_CROP_STREAM, _CUTOUT_STREAM = 1, 2


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of images in [0, 1], for the three channels that leave the loader."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class CropFlip:
    """Zero padding, a random crop back to the size, a random horizontal flip, an erased square."""

    padding: int
    """Pixels on each side; 0: no crop."""

    flip: bool
    """Flip one half of the images."""

    cutout: int = 0
    """Side of the erased square in pixels, centred anywhere in the image and clipped at its border; 0: none."""


def crop_flip(images: Tensor, bits: Tensor, padding: int, flip: bool) -> Tensor:
    """Crop each zero-padded image at its own offset, and flip it or not, as its hashed bits say.

    Args:
        images: [b, H, W, C], any dtype.
        bits: int64 [b] hashed values.
        padding: pixels on each side.
        flip: whether to flip at all.

    Returns:
        [b, H, W, C].
    """
    num, height, width, channels = images.shape
    padded = images.new_zeros(num, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = images
    rows = torch.arange(height, device=images.device) + uniform_int(bits, 0, 2 * padding + 1)[:, None]
    columns = torch.arange(width, device=images.device).expand(num, width)
    if flip:
        columns = torch.where(coin(bits)[:, None], width - 1 - columns, columns)
    columns = columns + uniform_int(bits, 1, 2 * padding + 1)[:, None]
    # One gather of whole pixels by their position in the batch: three times as fast as indexing by (image, row, column).
    first = torch.arange(num, device=images.device)[:, None] * padded.shape[1] + rows
    pixels = first[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.view(-1)).view(images.shape)


def cutout_mask(bits: Tensor, height: int, width: int, side: int) -> Tensor:
    """Zero in a square of `side` pixels around a hashed centre, one elsewhere: float32 [b, H, W, 1]."""

    def outside(length: int, field: int) -> Tensor:
        first = uniform_int(bits, field, length)[:, None] - side // 2
        position = torch.arange(length, device=bits.device)
        return (position < first) | (position >= first + side)

    return (outside(height, 0)[:, :, None] | outside(width, 1)[:, None, :]).float()[..., None]


class BatchTransform:
    """From pixels as they are stored to what the network sees."""

    def __init__(
        self,
        normalization: Normalization,
        *,
        augmentation: CropFlip | None,
        seed: int,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        self.augmentation = augmentation
        self.seed = seed
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = torch.tensor(normalization.mean, device=device) * 255
        self._scale = 1 / (torch.tensor(normalization.std, device=device) * 255)

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Augment and normalise.

        Args:
            images: [b, H, W, C], C = 1 or 3; uint8, or float that is already normalised.
            indices: int64 [b], the sample of each image.
            epoch: of the draw.

        Returns:
            float32 [b, 3, H, W] in the memory format asked for.
        """
        augmentation = self.augmentation
        if augmentation is not None and (augmentation.padding or augmentation.flip):
            bits = hash_indices(indices, self.seed, epoch, _CROP_STREAM)
            images = crop_flip(images, bits, augmentation.padding, augmentation.flip)
        pixels = self._normalize(images)
        if augmentation is not None and augmentation.cutout:
            bits = hash_indices(indices, self.seed, epoch, _CUTOUT_STREAM)
            mask = cutout_mask(bits, images.shape[1], images.shape[2], augmentation.cutout)
            pixels *= mask.permute(0, 3, 1, 2)
        return pixels

    def _normalize(self, images: Tensor) -> Tensor:
        images = images.expand(-1, -1, -1, 3)
        if images.is_floating_point():
            return images.permute(0, 3, 1, 2).contiguous(memory_format=self._memory_format).float()
        if self._memory_format is torch.contiguous_format:
            planes = images.permute(0, 3, 1, 2).contiguous().float()
            return planes.sub_(self._mean[:, None, None]).mul_(self._scale[:, None, None])
        # Rows of W * 3 numbers with constants as wide: vectorised, where a last dimension of 3 would not be.
        num, height, width, channels = images.shape
        rows = images.reshape(num, height, width * channels).float()
        rows.sub_(self._mean.repeat(width)).mul_(self._scale.repeat(width))
        return rows.view(images.shape).permute(0, 3, 1, 2)
