"""What can be said of the `data` section without decoding images: is all there, what shape will it have."""

from __future__ import annotations

from dataclasses import dataclass

from locsgd_dist.data.config import DataConfig
from locsgd_dist.data.recipe import resolve, resolve_augmentation
from locsgd_dist.data.sources import Source, image_folders, list_images, open_source, unknown_name
from locsgd_dist.data.standard_sets import STANDARD_SETS


@dataclass(frozen=True)
class DataShape:
    """What a network must take and give."""

    num_classes: int

    image_size: int
    """Side of the square input in pixels."""

    channels: int = 3


def data_shape(config: DataConfig) -> DataShape:
    """Classes and input size: of an imagefolder by its folder names, of a factory by calling it.

    Raises:
        ValueError: as `check_data`, where what is missing is needed to tell.
    """
    if config.name == "digits":
        return DataShape(10, config.image_size or 32)
    if config.name in STANDARD_SETS:
        return DataShape(STANDARD_SETS[config.name].num_classes, config.image_size or 32)
    if config.name == "imagefolder":
        return DataShape(len(image_folders(config.folder)[2]), config.image_size or 224)
    if ":" in config.name:
        source = open_source(config)
        return DataShape(source.num_classes, config.image_size or source.image_size)
    raise unknown_name(config.name)


def check_data(config: DataConfig) -> None:
    """Check that the data set is there and as large as the configuration wants it; decodes nothing.

    Raises:
        ValueError: one line that names the key and the remedy.
    """
    if config.name in STANDARD_SETS:
        spec = STANDARD_SETS[config.name]
        if not config.download:
            spec.require_files(config.folder)
        check_train_samples(config, spec.num_train)
        size = data_shape(config).image_size
        resolve_augmentation(config, size, photographs=spec.photographs, self_augmenting=False)
    elif config.name == "imagefolder":
        train, _, _ = image_folders(config.folder)
        if config.train_samples is not None:
            check_train_samples(config, len(list_images(train)))
        resolve_augmentation(config, data_shape(config).image_size, photographs=True, self_augmenting=False)
    else:
        source = open_source(config)
        check_source(config, source)
        resolve(config, source)


def check_source(config: DataConfig, source: Source) -> None:
    """Check an open data set: enough samples, all classes in range.

    Raises:
        ValueError: as `check_data`.
    """
    check_train_samples(config, len(source.train))
    if config.train_samples is not None and source.train.targets is None:
        raise ValueError(f"data.train_samples needs targets, the class of each sample, which {config.name} lacks")
    for items in (source.train, source.val):
        targets = items.targets
        if targets is not None and not 0 <= targets.min() <= targets.max() < source.num_classes:
            raise ValueError(
                f"data.name: classes of {config.name} must lie in [0, {source.num_classes}), "
                f"got {targets.min()} to {targets.max()}"
            )


def check_train_samples(config: DataConfig, available: int) -> None:
    """Raises ValueError where `data.train_samples` asks for more than there are."""
    if config.train_samples is not None and config.train_samples > available:
        raise ValueError(
            f"data.train_samples must be at most {available}, the whole training set of {config.name}, "
            f"got {config.train_samples}"
        )
