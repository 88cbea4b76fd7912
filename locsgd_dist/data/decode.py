"""Decoding a whole split to one uint8 array, once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from locsgd_dist.data.cache import cached_array, fingerprint
from locsgd_dist.data.items import ArrayItems, FileItems, Fit, Items
from locsgd_dist.data.loader import SampleDataset, stop_workers

_CHUNK = 256
"""Samples that a decoding process hands over at once."""

Images = NDArray[np.uint8]
Classes = NDArray[np.int64]


def decode(
    items: Items, chosen: NDArray[np.int64], size: int, *, use_cache: bool, num_workers: int
) -> tuple[Images, Classes]:
    """Decode samples to one array.

    Args:
        items: the split.
        chosen: [n] indices of the samples wanted.
        size: side of the result in pixels.
        use_cache: keep decoded files in the cache folder, or find them there.
        num_workers: decoding processes.

    Returns:
        Images [n, size, size, C], C = 1 or 3, and classes [n]. The images may be a private mapping of a file.

    Raises:
        OSError: naming a file that cannot be decoded.
        ValueError: for a data set of the user's own that does not give uint8 images.
    """
    if isinstance(items, ArrayItems):
        return _resized(items.images[chosen], size), items.targets[chosen]
    if isinstance(items, FileItems) and use_cache:
        key = fingerprint(items.root, items.names[chosen], f"fit {size}")
        return cached_array(key, lambda: _decode_all(items, chosen, size, num_workers)[0]), items.targets[chosen]
    return _decode_all(items, chosen, size, num_workers)


def _decode_all(items: Items, chosen: NDArray[np.int64], size: int, num_workers: int) -> tuple[Images, Classes]:
    # Processes, not threads: of a tiny image's time, most is spent in Python. Few images are not worth a fork.
    requests = [(0, index) for index in range(len(chosen))]
    loader = DataLoader(
        SampleDataset(items, chosen, Fit(size), seed=0),
        batch_sampler=[requests[first : first + _CHUNK] for first in range(0, len(requests), _CHUNK)],
        num_workers=num_workers if len(chosen) > 4 * _CHUNK else 0,
        generator=torch.Generator(),  # Else a seed would be drawn from the training process's.
    )
    images = np.empty((len(chosen), size, size, 3), dtype=np.uint8)
    targets = np.empty(len(chosen), dtype=np.int64)
    loaded: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(loader)
    try:
        for indices, pictures, classes in loaded:
            if pictures.dtype != torch.uint8:
                raise ValueError(f"data.in_memory=true holds uint8 images, but the factory gave {pictures.dtype}")
            images[indices.numpy()] = pictures.permute(0, 2, 3, 1).numpy()
            targets[indices.numpy()] = classes.numpy()
    finally:
        stop_workers(loaded)
    return images, targets


def _resized(images: Images, size: int) -> Images:
    if images.shape[1:3] == (size, size):
        return images
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    chunks = [functional.resize(chunk, [size, size], antialias=True) for chunk in planes.split(4096)]
    return np.ascontiguousarray(torch.cat(chunks).permute(0, 2, 3, 1).numpy())
