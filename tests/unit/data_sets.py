"""Tiny data sets in the real formats, and data sets of a user's own, for the tests of `locsgd_dist.data`."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from locsgd_dist.data import DataBundle, DataConfig, build_data


def build(config: DataConfig, *, rank: int = 0, world_size: int = 1, batch: int = 8, **kwargs: Any) -> DataBundle:
    """One rank's streams on the CPU."""
    arguments = {"seed": 0, "device": torch.device("cpu")} | kwargs
    return build_data(
        config, rank=rank, world_size=world_size, local_world_size=world_size, per_gpu_batch=batch, **arguments
    )


class Numbered(Dataset):
    """Random uint8 images, each of a class of its own: a batch's targets tell which samples it holds."""

    def __init__(self, split: str, num: int = 50, num_val: int = 23, side: int = 16, channels: int = 3):
        self.num_classes = max(num, num_val)
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        shape = (num if split == "train" else num_val, channels, side, side)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], index


class NoisyPictures(Numbered):
    """PIL images that the data set itself augments at random."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = v2.functional.to_pil_image(self.images[index])
        return v2.RandomCrop(picture.size, padding=4)(picture), index


class Floats(Numbered):
    """Float images, to be taken as they come."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index] / 255, index


class Labelled(Dataset):
    """Six samples with `targets` and nothing else; `sample` is what each of them is."""

    def __init__(self, split: str, targets: tuple[int, ...] = (0, 1, 2, 0, 1, 2), sample: Any = None):
        self.targets = list(targets)
        self.sample = torch.zeros(3, 8, 8, dtype=torch.uint8) if sample is None else sample

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.sample, self.targets[index]


class Unlabelled(Labelled):
    """A data set whose classes cannot be known ahead."""

    def __init__(self, split: str):
        super().__init__(split)
        del self.targets
        self.classes = ["a", "b", "c"]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.sample, index % 3


class Anonymous(Unlabelled):
    """A data set that does not say how many classes it has."""

    def __init__(self, split: str):
        super().__init__(split)
        del self.classes


def write_image_folder(
    root: Path, *, num_classes: int = 3, per_class: int = 5, size: tuple[int, int] = (16, 16), val: str = "val"
) -> None:
    """`root/train` and `root/val` with PNG files of random pixels; `size` is (width, height)."""
    rng = np.random.default_rng(0)
    for split in ("train", val):
        for number in range(num_classes):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:04}.png")


def write_mnist(folder: Path, num_train: int = 20, num_val: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """IDX files as the MNIST sets come in: big-endian header, then bytes. Returns images and classes by split."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for split, num in (("train", num_train), ("t10k", num_val)):
        images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels = np.arange(num, dtype=np.uint8) % 10
        (folder / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()
        )
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, num) + labels.tobytes())
        written[split] = images, labels
    return written


def write_cifar(
    folder: Path, files: list[str], meta: str, *, label_key: str, per_file: int = 4
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pickled batches as the CIFAR sets come in: rows of 3072 bytes, the red plane first."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for file in files:
        rows = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, per_file)
        (folder / file).write_bytes(pickle.dumps({"data": rows, label_key: labels.tolist()}))
        written[file] = rows, labels
    names = {"label_names" if label_key == "labels" else "fine_label_names": [str(i) for i in range(10)]}
    (folder / meta).write_bytes(pickle.dumps(names))
    return written
