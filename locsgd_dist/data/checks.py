"""What can be said of the `data` section without decoding an image: is all there, and what shape will come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from locsgd_dist.data.config import DataConfig
from locsgd_dist.data.sources import (
    TORCHVISION_SETS,
    Source,
    custom,
    digits,
    image_folders,
    list_images,
    unknown_name,
)


@dataclass(frozen=True)
class DataShape:
    """What a network must take and give."""

    num_classes: int
    image_size: int
    channels: int = 3


def data_shape(config: DataConfig) -> DataShape:
    """Classes and input size; for an imagefolder by its folder names, for a factory by calling it.

    Raises:
        ValueError: as `check_data`, where the answer needs what is missing.
    """
    if config.name == "digits":
        return DataShape(10, config.image_size or 32)
    if config.name in TORCHVISION_SETS:
        return DataShape(TORCHVISION_SETS[config.name].num_classes, config.image_size or 32)
    if config.name == "imagefolder":
        return DataShape(len(image_folders(config)[2]), config.image_size or 224)
    if ":" in config.name:
        source = custom(config)
        return DataShape(source.num_classes, config.image_size or source.image_size)
    raise ValueError(unknown_name(config.name))


def check_data(config: DataConfig) -> None:
    """Check that the data set is there and as large as the configuration wants it; decodes nothing.

    Raises:
        ValueError: one line that names the key and what would help.
    """
    if config.name == "digits":
        _check_samples(config, len(digits().train))
    elif config.name in TORCHVISION_SETS:
        _check_standard_files(config)
        _check_samples(config, TORCHVISION_SETS[config.name].num_train)
    elif config.name == "imagefolder":
        train, _, _ = image_folders(config)
        if config.train_samples is not None:
            _check_samples(config, len(list_images(train)))
    elif ":" in config.name:
        source = custom(config)
        check_targets(source)
        _check_samples(config, len(source.train))
    else:
        raise ValueError(unknown_name(config.name))


def check_targets(source: Source) -> None:
    """Raises ValueError where a class that is known ahead lies outside [0, num_classes)."""
    for items in (source.train, source.val):
        targets = items.targets
        if (
            targets is not None
            and len(targets)
            and not 0 <= targets.min() <= targets.max() < source.num_classes
        ):
            raise ValueError(
                f"data.name: classes must lie in [0, {source.num_classes}), "
                f"got {targets.min()} to {targets.max()}"
            )


def _check_standard_files(config: DataConfig) -> None:
    missing = TORCHVISION_SETS[config.name].missing(Path(config.root))
    if missing and not config.download:
        raise ValueError(
            f"data.root: {config.name} needs {str(missing[0])!r}, which is not there; "
            f"give the folder that holds it, or data.download=true to fetch it"
        )


def _check_samples(config: DataConfig, available: int) -> None:
    if config.train_samples is not None and config.train_samples > available:
        raise ValueError(
            f"data.train_samples must be at most {available}, the size of the training set "
            f"of {config.name}, got {config.train_samples}"
        )
