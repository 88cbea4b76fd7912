"""Means and deviations of well-known data sets, of images in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of the three channels of images in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _grey(mean: float, std: float) -> Normalization:
    return Normalization((mean, mean, mean), (std, std, std))


NORMALIZATIONS = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": _grey(0.3057, 0.3235),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": _grey(0.1307, 0.3081),
    "fashion_mnist": _grey(0.2860, 0.3530),
}
"""By the names of `data.normalization`; of the training sets, at their usual sizes."""
