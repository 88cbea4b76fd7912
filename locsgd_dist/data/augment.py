"""Batched augmentation on the device: pad, crop, flip and cutout of uint8 images, then normalisation.

All that is random is a hash of (seed, draw, sample index), see `hashing`; the draw is the epoch, or goes round
(`data.draws`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locsgd_dist.data.hashing import coin, hash_indices, uniform_int
from locsgd_dist.data.normalization import Normalization

_CROP_STREAM, _CUTOUT_STREAM = 1, 2


@dataclass(frozen=True)
class CropFlip:
    """Zero padding and a random crop back to the size, a random horizontal flip, an erased square."""

    padding: int
    """Pixels on each side."""

    flip: bool
    """Flip one half of the images."""

    cutout: int = 0
    """Side in pixels of the erased square, centred anywhere and clipped at the border; 0: none."""


def crop_flip(images: Tensor, bits: Tensor, padding: int, flip: bool) -> Tensor:
    """Crop each zero-padded image at its own offset and flip it or not, as its hash says.

    Args:
        images: [b, H, W, C], any dtype.
        bits: int64 [b], a hash for each image.
        padding: pixels on each side.
        flip: whether to flip at all.

    Returns:
        [b, H, W, C].
    """
    num, height, width, channels = images.shape
    device = images.device
    padded = images.new_zeros(num, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = images
    rows = torch.arange(height, device=device) + uniform_int(bits, 0, 2 * padding + 1)[:, None]
    columns = torch.arange(width, device=device).expand(num, width)
    if flip:
        columns = torch.where(coin(bits)[:, None], width - 1 - columns, columns)
    columns = columns + uniform_int(bits, 1, 2 * padding + 1)[:, None]
    # One gather of whole pixels by their number in the batch: much faster than indexing by image, row, column.
    row_numbers = torch.arange(num, device=device)[:, None] * padded.shape[1] + rows
    numbers = row_numbers[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, numbers.view(-1)).view(images.shape)


def cutout_mask(bits: Tensor, height: int, width: int, side: int) -> Tensor:
    """0 in a square of `side` pixels around each hash's centre, else 1: float32 [b, H, W]."""

    def outside(length: int, field: int) -> Tensor:
        first = uniform_int(bits, field, length)[:, None] - side // 2
        positions = torch.arange(length, device=bits.device)
        return (positions < first) | (positions >= first + side)

    return (outside(height, 0)[:, :, None] | outside(width, 1)[:, None, :]).float()


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
        self._augmentation = augmentation
        self._seed = seed
        self._channels_last = channels_last
        self._mean = 255 * torch.tensor(normalization.mean, device=device)
        self._scale = 1 / (255 * torch.tensor(normalization.std, device=device))

    def __call__(self, images: Tensor, indices: Tensor, draw: int) -> Tensor:
        """Augment and normalise.

        Args:
            images: [b, H, W, C], C = 1 or 3; uint8, or float that is already normalised.
            indices: int64 [b], the sample that each image is.
            draw: which of each image's augmentations.

        Returns:
            float32 [b, 3, H, W], in the memory format asked for.
        """
        augmentation = self._augmentation
        if augmentation is None:
            return self._normalize(images)
        bits = hash_indices(indices, self._seed, draw, _CROP_STREAM)
        pixels = self._normalize(crop_flip(images, bits, augmentation.padding, augmentation.flip))
        if augmentation.cutout:
            bits = hash_indices(indices, self._seed, draw, _CUTOUT_STREAM)
            pixels *= cutout_mask(bits, pixels.shape[2], pixels.shape[3], augmentation.cutout)[:, None]
        return pixels

    def _normalize(self, images: Tensor) -> Tensor:
        images = images.expand(-1, -1, -1, 3)
        if not self._channels_last:
            planes = images.permute(0, 3, 1, 2).contiguous().float()
            if images.is_floating_point():
                return planes
            return planes.sub_(self._mean[:, None, None]).mul_(self._scale[:, None, None])
        pixels = images.contiguous().float()
        if not images.is_floating_point():
            # Rows of W * 3 numbers, constants as wide: vectorised, as a last dimension of 3 is not.
            width = images.shape[2]
            pixels.flatten(2).sub_(self._mean.repeat(width)).mul_(self._scale.repeat(width))
        return pixels.permute(0, 3, 1, 2)
