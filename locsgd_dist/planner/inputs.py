"""What the network takes and gives, and how long an epoch is, told from the configuration alone: no file is opened."""

from __future__ import annotations

from dataclasses import dataclass

from locsgd_dist.data import DataConfig, DataShape, data_shape
from locsgd_dist.data.standard_sets import STANDARD_SETS

IMAGENET_CLASSES, IMAGENET_TRAIN = 1000, 1_281_167
DIGITS_TRAIN = 1437


@dataclass(frozen=True)
class PlannedData:
    """Input, classes and length of an epoch.

    Attributes:
        shape: what the network takes and gives.
        num_train: images of an epoch.
        assumption: what was taken for granted, in a sentence; empty where the configuration says it all.
    """

    shape: DataShape
    num_train: int
    assumption: str = ""


def planned_data(config: DataConfig, num_classes: int | None = None, num_train: int | None = None) -> PlannedData:
    """The known sets by their names; an image folder, which may be on another machine, as ImageNet unless told.

    Args:
        config: the ``data`` section.
        num_classes, num_train: in the place of what the set is known to have.

    Raises:
        ValueError: an unknown set, or one of which too little is known; the option to give is named.
    """
    assumption = ""
    if config.name == "digits" or config.name in STANDARD_SETS:
        shape = data_shape(config)
        known_train = DIGITS_TRAIN if config.name == "digits" else STANDARD_SETS[config.name].num_train
    elif config.name == "imagefolder":
        shape, known_train = DataShape(IMAGENET_CLASSES, config.image_size or 224), IMAGENET_TRAIN
        taken = [
            text
            for given, text in (
                (num_classes, f"{IMAGENET_CLASSES} classes (--num-classes)"),
                (num_train or config.train_samples, f"{IMAGENET_TRAIN:,} training images (--num-train)"),
            )
            if given is None
        ]
        assumption = f"data.name=imagefolder is taken for ImageNet: {', '.join(taken)}." if taken else ""
    elif ":" in config.name:
        if num_classes is None or num_train is None or config.image_size is None:
            raise ValueError(
                f"--num-classes, --num-train and --data.image_size must be given for data.name={config.name}, "
                "which the planner does not call"
            )
        shape, known_train = DataShape(num_classes, config.image_size), num_train
    else:
        shape, known_train = data_shape(config), 0  # raises: it names the sets there are
    shape = DataShape(num_classes or shape.num_classes, shape.image_size)
    return PlannedData(shape, num_train or config.train_samples or known_train, assumption)
