"""Undecoded samples: arrays, image files, or a data set of the user's own, behind one interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

Picture = Image.Image | Tensor
"""A PIL image, a uint8 [C, H, W] tensor, or a float [C, H, W] tensor that is taken as already normalised."""


class Items(Protocol):
    """The samples of one split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Picture, int]: ...

    @property
    def targets(self) -> NDArray[np.int64] | None:
        """Classes of all samples; None where only decoding would tell."""


@dataclass(frozen=True)
class ArrayItems:
    """Images of one size that are in memory anyway."""

    images: NDArray[np.uint8]
    """[n, H, W, C], C = 1 or 3."""

    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return torch.from_numpy(self.images[index]).permute(2, 0, 1), int(self.targets[index])


class FileItems:
    """Image files. Paths lie in one numpy array: Python objects would be copied into each worker by and by."""

    def __init__(self, root: Path, names: Sequence[str], targets: Sequence[int]) -> None:
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])
        self.targets = np.array(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        """The image in RGB. Raises OSError naming a file that cannot be decoded."""
        path = self.root / os.fsdecode(self.names[index])
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), int(self.targets[index])
        except OSError as error:
            raise OSError(f"cannot decode {path}: {error}") from error


class DatasetItems:
    """A map-style data set of the user's own; its classes are known ahead if it has `targets`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        targets = getattr(dataset, "targets", None)
        self.targets = None if targets is None else np.asarray(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        """The sample as the data set gives it. Raises ValueError where that is no picture."""
        picture, target = self.dataset[index]
        if isinstance(picture, Image.Image):
            return picture if picture.mode in ("L", "RGB") else picture.convert("RGB"), int(target)
        if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (1, 3):
            got = f"shape {list(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
            raise ValueError(f"data.name: a factory's images must be PIL images or tensors [1 or 3, H, W], got {got}")
        if picture.dtype != torch.uint8 and not picture.is_floating_point():
            raise ValueError(f"data.name: a factory's image tensors must be uint8 or float, got {picture.dtype}")
        return picture, int(target)


def fit(picture: Picture, size: int) -> Tensor:
    """Bring a picture to [C, size, size]: resize its shorter side (bilinear, antialiased), take the centre.

    Raises:
        ValueError: for a float picture of another size, since those are taken as they come.
    """
    if isinstance(picture, Tensor) and picture.is_floating_point():
        if picture.shape[1:] != (size, size):
            raise ValueError(
                f"data.image_size={size} needs float images of that size, which are taken as they come, "
                f"got shape {list(picture.shape)}"
            )
        return picture.float()
    if functional.get_size(picture) != [size, size]:
        picture = functional.center_crop(functional.resize(picture, [size], antialias=True), [size, size])
    return picture if isinstance(picture, Tensor) else functional.pil_to_tensor(picture)


class Fit(v2.Transform):
    """`fit` as a transform."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, picture: Picture) -> Tensor:
        return fit(picture, self._size)
