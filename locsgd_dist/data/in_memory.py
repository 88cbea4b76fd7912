"""Sets that fit in memory: decoded once, held as uint8 on the device, gathered and augmented there in batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional

from locsgd_dist.data.augment import Normalization
from locsgd_dist.data.cache import cached_array, fingerprint
from locsgd_dist.data.items import ArrayItems, FileItems, Items, fit
from locsgd_dist.data.sampler import Step, StepPlan


@dataclass(frozen=True)
class RawBatch:
    """One rank's samples of a step, on the device, as they are stored."""

    step: Step
    indices: Tensor
    """int64 [b]."""

    images: Tensor
    """[b, H, W, C], uint8, or float that is already normalised."""

    targets: Tensor
    """int64 [b]."""


class InMemoryFetcher:
    """Gathers batches of a set that lies on the device."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        """
        Args:
            images: uint8 [n, H, W, C] on the device.
            targets: int64 [n] on the device.
        """
        self.images = images
        self.targets = targets

    def start(self, plan: StepPlan) -> Iterator[RawBatch]:
        for step in plan.to(self.images.device):
            images, targets = (held.index_select(0, step.indices) for held in (self.images, self.targets))
            yield RawBatch(step, step.indices, images, targets)

    def close(self) -> None:
        """Nothing to stop."""


def decode(
    items: Items, chosen: NDArray[np.int64], size: int, *, use_cache: bool, num_threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode samples to one uint8 array.

    Args:
        items: the split.
        chosen: [n] indices of the samples wanted.
        size: side of the result in pixels.
        use_cache: keep decoded files in the cache folder, or find them there.
        num_threads: decoding threads.

    Returns:
        images [n, size, size, C], C = 1 or 3, and classes [n]. The images may be a private mapping of a file.
    """
    if isinstance(items, ArrayItems):
        return _resized(items.images[chosen], size), items.targets[chosen]
    if isinstance(items, FileItems):

        def make() -> NDArray[np.uint8]:
            return _decode_files(items, chosen, size, num_threads)

        if not use_cache:
            return make(), items.targets[chosen]
        return cached_array(fingerprint(items.root, items.names[chosen], f"fit {size}"), make), items.targets[
            chosen
        ]
    samples = [items[int(index)] for index in chosen]
    images = [_channels_last(fit(picture, size)) for picture, _ in samples]
    return np.stack(images), np.array([target for _, target in samples], dtype=np.int64)


def measure(images: NDArray[np.uint8]) -> Normalization:
    """Mean and deviation per channel of [n, H, W, C] images, from exact sums: the same on every machine."""
    values = np.arange(256, dtype=np.float64) / 255
    moments = []
    for channel in range(images.shape[-1]):
        counts = np.zeros(256, dtype=np.int64)
        for first in range(0, len(images), 4096):
            counts += np.bincount(images[first : first + 4096, ..., channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        # A channel that never varies has no scale of its own; any positive one will do.
        moments.append((mean, variance**0.5 or 1.0))
    if len(moments) == 1:
        moments *= 3
    (mean_r, std_r), (mean_g, std_g), (mean_b, std_b) = moments
    return Normalization((mean_r, mean_g, mean_b), (std_r, std_g, std_b))


def _decode_files(
    items: FileItems, chosen: NDArray[np.int64], size: int, num_threads: int
) -> NDArray[np.uint8]:
    out = np.empty((len(chosen), size, size, 3), dtype=np.uint8)

    def decode_one(position: int) -> None:
        out[position] = _channels_last(fit(items[int(chosen[position])][0], size))

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(decode_one, range(len(chosen))):
            pass  # Asking for each result raises what its thread has raised.
    return out


def _channels_last(picture: Tensor) -> NDArray[np.uint8]:
    if picture.dtype != torch.uint8:
        raise ValueError(f"data.in_memory=yes holds uint8 images only, but the factory gave {picture.dtype}")
    return picture.permute(1, 2, 0).numpy()


def _resized(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if images.shape[1:3] == (size, size):
        return images
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    chunks = [functional.resize(chunk, [size, size], antialias=True) for chunk in planes.split(4096)]
    return np.ascontiguousarray(torch.cat(chunks).permute(0, 2, 3, 1).numpy())
