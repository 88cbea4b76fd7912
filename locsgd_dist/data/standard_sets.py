"""Data sets that torchvision reads: where their files are, what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torchvision import datasets

from locsgd_dist.data.items import ArrayItems


@dataclass(frozen=True)
class StandardSet:
    """One of torchvision's data sets."""

    name: str
    """As in `data.name`."""

    dataset: type[datasets.VisionDataset]

    folder: str
    """Of the files, below `data.root`."""

    files: tuple[str, ...]
    num_classes: int
    num_train: int
    photographs: bool = True
    """Mirrored images are as good as the originals."""

    cutout: float = 0.5
    """Side of the erased square, as a part of the image's."""

    def require_files(self, root: Path) -> None:
        """Raises ValueError naming the first file that is missing."""
        missing = self._missing(root)
        if missing:
            raise ValueError(
                f"data.root: {self.name} needs {str(missing[0])!r}, which is not there; "
                f"name the folder that holds {self.folder}/, or fetch it with data.download=true"
            )

    def load(self, root: Path, *, train: bool, download: bool) -> ArrayItems:
        """Read a split, after fetching what is missing if `download`.

        Raises:
            ValueError: naming data.root or data.download, where files are missing, corrupt or not to be had.
        """
        if download and self._missing(root):
            try:
                self._fetch(root)
            except (OSError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"data.download: cannot fetch {self.name} into {str(root)!r}: {reason}") from error
        self.require_files(root)
        try:
            dataset: Any = self.dataset(root, train=train)
        except RuntimeError as error:
            raise ValueError(f"data.root: {str(root / self.folder)!r} is corrupt: {error}") from error
        images = np.asarray(dataset.data)
        return ArrayItems(
            images if images.ndim == 4 else images[..., None], np.asarray(dataset.targets, dtype=np.int64)
        )

    def _fetch(self, root: Path) -> None:
        # The ranks of a machine come here at once: one fetches, the others wait and find the files.
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{self.name}.lock"):
            if self._missing(root):
                self.dataset(root, download=True)

    def _missing(self, root: Path) -> list[Path]:
        paths = [root / self.folder / name for name in self.files]
        return [path for path in paths if not path.is_file()]


_MNIST_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

STANDARD_SETS = {
    standard.name: standard
    for standard in (
        StandardSet(
            "cifar10",
            datasets.CIFAR10,
            "cifar-10-batches-py",
            (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
            num_classes=10,
            num_train=50_000,
        ),
        StandardSet(
            "cifar100",
            datasets.CIFAR100,
            "cifar-100-python",
            ("train", "test", "meta"),
            num_classes=100,
            num_train=50_000,
            cutout=0.25,
        ),
        StandardSet(
            "mnist",
            datasets.MNIST,
            "MNIST/raw",
            _MNIST_FILES,
            num_classes=10,
            num_train=60_000,
            photographs=False,
        ),
        StandardSet(
            "fashion_mnist",
            datasets.FashionMNIST,
            "FashionMNIST/raw",
            _MNIST_FILES,
            num_classes=10,
            num_train=60_000,
        ),
    )
}
