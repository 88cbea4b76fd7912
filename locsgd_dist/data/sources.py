"""The data sets by name: their samples, their classes, and what is peculiar to them."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional

from locsgd_dist.data.config import DataConfig
from locsgd_dist.data.items import ArrayItems, DatasetItems, FileItems, Items
from locsgd_dist.data.normalization import NORMALIZATIONS, Normalization
from locsgd_dist.data.standard_sets import STANDARD_SETS

NAMES = ("digits", *STANDARD_SETS, "imagefolder")


@dataclass(frozen=True)
class Source:
    """The two splits of a data set."""

    train: Items
    val: Items
    num_classes: int

    image_size: int
    """The usual input size; `data.image_size` overrides it."""

    normalization: Normalization = NORMALIZATIONS["imagenet"]
    """`data.normalization` overrides it."""

    photographs: bool = True
    """Mirrored images are as good as the originals; digits, which this is not true of, are shifted less too."""

    cutout: float = 0.5
    """Side of the erased square, as a part of the image's."""

    self_augmenting: bool = False
    """Samples may be random in themselves: decoding them once would freeze them."""


def open_source(config: DataConfig) -> Source:
    """Open the data set that `data.name` names.

    Raises:
        ValueError: naming the key and what is missing.
    """
    if config.name == "digits":
        return digits()
    if config.name in STANDARD_SETS:
        return standard(config)
    if config.name == "imagefolder":
        return imagefolder(config)
    if ":" in config.name:
        return custom(config)
    raise unknown_name(config.name)


def unknown_name(name: str) -> ValueError:
    """The error for a `data.name` that is none."""
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return ValueError(f"data.name must be one of {', '.join(NAMES)} or package.module:factory, got {name!r}{hint}")


def digits() -> Source:
    """scikit-learn's 1797 real 8x8 digits; four fifths of each class train, and the split never changes."""
    from sklearn.datasets import load_digits  # Takes a second to import, which the other sets need not wait for.
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
        normalization=NORMALIZATIONS["digits"],
        photographs=False,
    )


def standard(config: DataConfig) -> Source:
    """One of torchvision's sets, from its standard files."""
    spec, root = STANDARD_SETS[config.name], config.folder
    return Source(
        spec.load(root, train=True, download=config.download),
        spec.load(root, train=False, download=False),
        num_classes=spec.num_classes,
        image_size=32,
        normalization=NORMALIZATIONS[spec.name],
        photographs=spec.photographs,
        cutout=spec.cutout,
    )


def imagefolder(config: DataConfig) -> Source:
    """Folders of image files, one per class."""
    train, val, classes = image_folders(config.folder)
    return Source(list_images(train), list_images(val), num_classes=len(classes), image_size=224)


def image_folders(root: Path) -> tuple[Path, Path, list[str]]:
    """The folders of both splits and the classes, without a look at the files.

    Raises:
        ValueError: naming data.root and what is missing there.
    """
    train = root / "train"
    val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not train.is_dir() or val is None:
        missing = "val/ or test/" if train.is_dir() else "train/"
        raise ValueError(
            f"data.root: {str(root)!r} has no {missing}; expected train/CLASS/ and val/CLASS/ (or test/CLASS/)"
        )
    classes, val_classes = (
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) for folder in (train, val)
    )
    if not classes:
        raise ValueError(f"data.root: {str(train)!r} must hold one folder per class, got none")
    if classes != val_classes:
        odd = min(set(classes) ^ set(val_classes))
        raise ValueError(
            f"data.root: {str(train)!r} and {str(val)!r} must hold the same classes; {odd!r} is in one only"
        )
    return train, val, classes


def list_images(folder: Path) -> FileItems:
    """All images in a folder of class folders. Raises ValueError where a class has none."""
    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise ValueError(f"data.root: {' '.join(str(error).split())}") from error
    names = [path.removeprefix(f"{folder}{os.sep}") for path, _ in found.samples]
    return FileItems(folder, names, found.targets)


def custom(config: DataConfig) -> Source:
    """A data set of the user's own.

    The number of classes is the training set's `num_classes`, else that of its `classes`, else one more than
    the largest of its `targets`. Where it has `mean` and `std` (of images in [0, 1]), its uint8 images are
    normalised by them, else by ImageNet's.
    """
    factory = _load_factory(config.name)
    try:
        train, val = (factory(split=split, **config.kwargs) for split in ("train", "val"))
    except TypeError as error:
        raise ValueError(f"data.kwargs do not fit {config.name}: {error}") from error
    items, val_items = DatasetItems(train), DatasetItems(val)
    if not len(items) or not len(val_items):
        raise ValueError(f"data.name: {config.name} gave a split without samples")
    normalization = NORMALIZATIONS["imagenet"]
    if hasattr(train, "mean") and hasattr(train, "std"):
        normalization = Normalization(tuple(train.mean), tuple(train.std))
    return Source(
        items,
        val_items,
        num_classes=_num_classes(config.name, items),
        image_size=min(functional.get_size(items[0][0])),
        normalization=normalization,
        self_augmenting=True,
    )


def _load_factory(name: str) -> Callable[..., Dataset[Any]]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"data.name: cannot import {module_name!r}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"data.name: module {module_name!r} has no callable {attribute!r}")
    return factory


def _num_classes(name: str, items: DatasetItems) -> int:
    if hasattr(items.dataset, "num_classes"):
        return int(items.dataset.num_classes)
    if hasattr(items.dataset, "classes"):
        return len(items.dataset.classes)
    if items.targets is not None:
        return int(items.targets.max()) + 1
    raise ValueError(f"data.name: the data set of {name} must have num_classes, classes or targets")
