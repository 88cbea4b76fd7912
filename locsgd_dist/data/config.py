"""The `data` section: which images, how they are augmented, and how they reach the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Augmentation = Literal["auto", "none", "crop_flip", "crop_flip_cutout", "imagenet_paper", "imagenet_torchvision"]


@dataclass(frozen=True)
class DataConfig:
    """The images to train on and how they are brought to the device."""

    name: str = "digits"
    """digits (bundled with scikit-learn), cifar10, cifar100, mnist, fashion_mnist, imagefolder, or
    package.module:factory, which is called as factory(split="train" or "val", **data.kwargs) and returns a
    map-style torch Dataset of (image, class): a PIL image, a uint8 CHW tensor, or a float CHW tensor that is
    taken as already normalised."""

    root: str = "data"
    """Folder with torchvision's standard files or, for imagefolder, with train/ and val/ (or test/), each
    holding one folder per class."""

    download: bool = False
    """Fetch missing standard files (cifar10, cifar100, mnist, fashion_mnist) into data.root."""

    train_samples: int | None = None
    """Train on a seeded, class-balanced subset of this many images (null: all of them)."""

    image_size: int | None = None
    """Side of the square input in pixels (null: 32; 224 for imagefolder; the first image's for a factory)."""

    augmentation: Augmentation = "auto"
    """auto: crop_flip for small images and for digits, imagenet_paper for images of more than 64 pixels, none
    for a factory. crop_flip pads by 1/8 of the side (1/16 and no flip for digits and the like); cutout adds
    an erased square; imagenet_paper: random resized crop and flip; imagenet_torchvision: TrivialAugment and
    random erasing on top, as torchvision's reference recipe."""

    normalization: Literal["auto", "imagenet", "digits", "cifar10", "cifar100", "mnist", "fashion_mnist"] = "auto"
    """Whose mean and deviation to normalise by (auto: the set's own; ImageNet's for imagefolder, and for a factory
    whose training set has no `mean` and `std`). Pretrained weights mostly expect imagenet."""

    draws: int | None = None
    """Ways in which each training image is augmented, in turn by epoch (null: anew in each epoch). What layers at rest
    make of them can then be kept and used again: localized.keep_outputs."""

    draws_from: int = 0
    """First epoch (from 0) of data.draws; in those before it each image is augmented anew; >= 0."""

    mixup_alpha: float = 0.0
    """MixUp's Beta parameter (0: off). With cutmix_alpha too, each batch draws one of the two."""

    cutmix_alpha: float = 0.0
    """CutMix's Beta parameter (0: off)."""

    workers: int = -1
    """Decoding processes per rank (-1: this machine's cores shared out among its ranks, 16 at most; 0: decode in
    the training process). Sets held in memory need them only while they are first decoded."""

    in_memory: bool | Literal["auto"] = "auto"
    """Hold the decoded images as uint8 on the device (auto: up to 2 GiB, where the augmentation works on
    decoded images; never for a factory, whose own randomness would freeze)."""

    cache: bool = True
    """Keep an imagefolder that was decoded into memory as a file, shared by the ranks of a machine and read
    by the next start ($LOCSGD_CACHE, by default ~/.cache/locsgd)."""

    val_batch: int | None = None
    """Images per rank and step of an evaluation (null: 256 up to 64 pixels, else the training batch)."""

    subset_seed: int = 0
    """Seed of the data.train_samples subset; apart from train.seed, so that seeds compare on one subset; >= 0."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of a package.module:factory."""

    @property
    def folder(self) -> Path:
        """`root` with ~ expanded, which neither YAML nor a shell does after an equals sign."""
        return Path(self.root).expanduser()

    def __post_init__(self) -> None:
        for key in ("train_samples", "image_size", "val_batch", "draws"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"data.{key} must be at least 1 (or null), got {value}")
        for key in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, key)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"data.{key} must be 0 (off) or positive and finite, got {value}")
        if self.draws_from < 0:
            raise ValueError(f"data.draws_from must be at least 0, got {self.draws_from}")
        if self.draws_from and self.draws is None:
            raise ValueError(f"data.draws must be at least 1 for data.draws_from={self.draws_from}, got null")
        if self.subset_seed < 0:
            raise ValueError(f"data.subset_seed must be at least 0, got {self.subset_seed}")
        if self.workers < -1:
            raise ValueError(f"data.workers must be -1 (sized to the machine) or at least 0, got {self.workers}")
        if self.kwargs and ":" not in self.name:
            raise ValueError(f"data.kwargs is for data.name=package.module:factory only, got data.name={self.name}")
