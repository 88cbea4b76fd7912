"""The data sets by name: where their samples are, how many classes they have, how they are augmented by default."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torch.utils.data import Dataset
from torchvision import datasets

from locsgd_dist.data.augment import Normalization
from locsgd_dist.data.config import DataConfig
from locsgd_dist.data.items import ArrayItems, DatasetItems, FileItems, Items, fit

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _grey(mean: float, std: float) -> Normalization:
    return Normalization((mean,) * 3, (std,) * 3)


@dataclass(frozen=True)
class Source:
    """The two splits of a data set and what is peculiar to it."""

    train: Items
    val: Items
    num_classes: int
    image_size: int
    """The usual input size; `data.image_size` overrides it."""

    normalization: Normalization | None = None
    """Published mean and deviation, if there are any."""

    photographs: bool = True
    """Mirrored images are as good; False for digits and the like, which are also shifted less."""

    cutout: float = 0.5
    """Side of the erased square, as a part of the image's."""

    frozen_randomness: bool = False
    """Samples may be random in themselves, so that decoding them once would freeze them."""


@dataclass(frozen=True)
class TorchvisionSet:
    """One of torchvision's data sets and its standard files."""

    dataset: type[datasets.VisionDataset]
    folder: str
    """Below data.root."""

    files: tuple[str, ...]
    num_classes: int
    num_train: int
    normalization: Normalization
    photographs: bool
    cutout: float = 0.5

    def missing(self, root: Path) -> list[Path]:
        return [path for path in (root / self.folder / name for name in self.files) if not path.is_file()]

    def load(self, root: Path, *, train: bool, download: bool) -> ArrayItems:
        """Read a split. Raises ValueError naming data.root where files are missing or corrupt."""
        if download and self.missing(root):
            # Every rank of the machine comes here at once: the first one fetches, the others find the files.
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{self.folder}.lock"):
                if self.missing(root):
                    self.dataset(root, download=True)
        try:
            dataset: Any = self.dataset(root, train=train)
        except RuntimeError as error:
            raise ValueError(f"data.root: {root / self.folder} is missing or corrupt ({error})") from error
        images = np.asarray(dataset.data)
        if images.ndim == 3:
            images = images[..., None]
        return ArrayItems(images, np.asarray(dataset.targets, dtype=np.int64))


_IDX_FILES = tuple(
    f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)

TORCHVISION_SETS = {
    "cifar10": TorchvisionSet(
        datasets.CIFAR10,
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        num_classes=10,
        num_train=50_000,
        normalization=Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        photographs=True,
    ),
    "cifar100": TorchvisionSet(
        datasets.CIFAR100,
        "cifar-100-python",
        ("train", "test", "meta"),
        num_classes=100,
        num_train=50_000,
        normalization=Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        photographs=True,
        cutout=0.25,
    ),
    "mnist": TorchvisionSet(
        datasets.MNIST,
        "MNIST/raw",
        _IDX_FILES,
        num_classes=10,
        num_train=60_000,
        normalization=_grey(0.1307, 0.3081),
        photographs=False,
    ),
    "fashion_mnist": TorchvisionSet(
        datasets.FashionMNIST,
        "FashionMNIST/raw",
        _IDX_FILES,
        num_classes=10,
        num_train=60_000,
        normalization=_grey(0.2860, 0.3530),
        photographs=True,
    ),
}

NAMES = ("digits", *TORCHVISION_SETS, "imagefolder")


def digits() -> Source:
    """scikit-learn's 1797 real 8x8 digits, four fifths of each class for training; the split never changes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    targets = data.target.astype(np.int64)
    train, val = train_test_split(np.arange(len(targets)), test_size=0.2, random_state=0, stratify=targets)
    return Source(
        ArrayItems(images[train], targets[train]),
        ArrayItems(images[val], targets[val]),
        num_classes=10,
        image_size=32,
        photographs=False,
    )


def torchvision_source(config: DataConfig) -> Source:
    spec, root = TORCHVISION_SETS[config.name], Path(config.root)
    return Source(
        spec.load(root, train=True, download=config.download),
        spec.load(root, train=False, download=False),
        num_classes=spec.num_classes,
        image_size=32,
        normalization=spec.normalization,
        photographs=spec.photographs,
        cutout=spec.cutout,
    )


def image_folders(config: DataConfig) -> tuple[Path, Path, list[str]]:
    """The folders of both splits and the class names, without a look at the files.

    Raises:
        ValueError: naming data.root and what is missing there.
    """
    root = Path(config.root)
    expected = "expected train/CLASS/* and val/CLASS/* (or test/CLASS/*)"
    train = root / "train"
    val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not train.is_dir() or val is None:
        missing = "train/" if not train.is_dir() else "val/ or test/"
        raise ValueError(f"data.root: {str(root)!r} has no {missing}; {expected}")
    classes, val_classes = (
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) for folder in (train, val)
    )
    if not classes:
        raise ValueError(f"data.root: {str(train)!r} holds no class folders; {expected}")
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))[0]
        raise ValueError(
            f"data.root: {str(train)!r} and {str(val)!r} must hold the same class folders; only one has {odd!r}"
        )
    return train, val, classes


def list_images(folder: Path) -> FileItems:
    """All images below a folder of class folders. Raises ValueError for a class without any."""
    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise ValueError(f"data.root: {' '.join(str(error).split())}") from error
    names = [str(Path(path).relative_to(folder)) for path, _ in found.samples]
    return FileItems(folder, names, found.targets)


def imagefolder(config: DataConfig) -> Source:
    train, val, classes = image_folders(config)
    return Source(list_images(train), list_images(val), num_classes=len(classes), image_size=224)


def load_factory(name: str) -> Callable[..., Dataset[Any]]:
    """The object behind "package.module:factory". Raises ValueError naming data.name."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"data.name: cannot import {module_name!r} of {name!r}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"data.name: {module_name!r} has no callable {attribute!r}")
    return factory


def custom(config: DataConfig) -> Source:
    """A data set of the user's own.

    The number of classes is the training set's `num_classes`, else that of its `classes`, else one more than the
    largest of its `targets`. Its `mean` and `std` (of images in [0, 1]) are used for normalisation if it has them.
    """
    factory = load_factory(config.name)
    try:
        train, val = (factory(split=split, **config.kwargs) for split in ("train", "val"))
    except TypeError as error:
        raise ValueError(f"data.kwargs do not fit {config.name} called with split=...: {error}") from error
    items, val_items = DatasetItems(train), DatasetItems(val)
    if not len(items):
        raise ValueError(f"data.name: {config.name} gave an empty training set")
    if hasattr(train, "num_classes"):
        num_classes = int(train.num_classes)
    elif hasattr(train, "classes"):
        num_classes = len(train.classes)
    elif items.targets is not None:
        num_classes = int(items.targets.max()) + 1
    else:
        raise ValueError(f"data.name: the data set of {config.name} needs num_classes, classes or targets")
    mean, std = getattr(train, "mean", None), getattr(train, "std", None)
    return Source(
        items,
        val_items,
        num_classes=num_classes,
        image_size=config.image_size or _side(items),
        normalization=Normalization(tuple(mean), tuple(std))
        if mean is not None and std is not None
        else None,
        frozen_randomness=True,
    )


def _side(items: Items) -> int:
    """The shorter side of the first image, to which others are fitted."""
    from torchvision.transforms.v2 import functional

    height, width = functional.get_size(items[0][0])
    return int(min(height, width))


def open_source(config: DataConfig) -> Source:
    """Open the data set that `data.name` names; `check_data` has found it in order."""
    if config.name == "digits":
        return digits()
    if config.name in TORCHVISION_SETS:
        return torchvision_source(config)
    if config.name == "imagefolder":
        return imagefolder(config)
    if ":" in config.name:
        return custom(config)
    raise ValueError(unknown_name(config.name))


def unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"data.name must be one of {', '.join(NAMES)} or package.module:factory, got {name!r}{hint}"


__all__ = ["IMAGENET", "NAMES", "TORCHVISION_SETS", "Source", "TorchvisionSet", "fit", "open_source"]
