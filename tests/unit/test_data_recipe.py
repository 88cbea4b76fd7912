"""What the section leaves to the data set: augmentation, place and normalisation of each kind of set."""

from dataclasses import replace

import numpy as np
import pytest

from locsgd_dist.data import DataConfig, Normalization
from locsgd_dist.data.augment import CropFlip
from locsgd_dist.data.items import ArrayItems
from locsgd_dist.data.recipe import resolve
from locsgd_dist.data.sources import Source

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def source(num: int = 100, **fields: object) -> Source:
    # The images of a large set, without their memory.
    images = np.broadcast_to(np.zeros((1, 1, 1, 1), dtype=np.uint8), (num, 8, 8, 3))
    items = ArrayItems(images, np.broadcast_to(np.zeros(1, dtype=np.int64), num))
    return replace(Source(items, items, num_classes=1, image_size=32), **fields)


def test_small_photographs_are_padded_by_an_eighth_and_flipped() -> None:
    recipe = resolve(DataConfig(), source())
    assert recipe.crop_flip == CropFlip(padding=4, flip=True, cutout=0)
    assert recipe.preset is None
    assert resolve(DataConfig(image_size=64), source()).crop_flip == CropFlip(padding=8, flip=True)
    cut = resolve(DataConfig(augmentation="crop_flip_cutout"), source(cutout=0.25))
    assert cut.crop_flip == CropFlip(padding=4, flip=True, cutout=8)


def test_digits_are_shifted_a_little_and_never_flipped() -> None:
    assert resolve(DataConfig(), source(photographs=False)).crop_flip == CropFlip(padding=2, flip=False)
    large = resolve(DataConfig(image_size=128), source(photographs=False))
    assert large.crop_flip == CropFlip(padding=8, flip=False)


def test_larger_images_are_cropped_out_of_by_workers() -> None:
    recipe = resolve(DataConfig(), source(image_size=224))
    assert (recipe.size, recipe.preset, recipe.crop_flip, recipe.in_memory) == (224, "imagenet_paper", None, False)
    assert resolve(DataConfig(image_size=64), source(image_size=224)).preset is None
    chosen = resolve(DataConfig(augmentation="imagenet_torchvision"), source())
    assert (chosen.size, chosen.preset) == (32, "imagenet_torchvision")


def test_sets_that_augment_themselves_are_left_alone() -> None:
    recipe = resolve(DataConfig(), source(self_augmenting=True))
    assert (recipe.preset, recipe.crop_flip, recipe.in_memory) == (None, None, False)
    assert resolve(DataConfig(in_memory=True), source(self_augmenting=True)).in_memory


@pytest.mark.parametrize(("num", "fits"), [(349_525, True), (349_526, False)])
def test_sets_are_held_up_to_two_gibibytes_of_both_splits(num: int, fits: bool) -> None:
    assert ((2 * num * 32 * 32 * 3) <= 2**31) == fits
    large = source(num)
    assert resolve(DataConfig(), large).in_memory == fits
    assert resolve(DataConfig(in_memory=True), large).in_memory
    assert not resolve(DataConfig(in_memory=False), large).in_memory
    assert resolve(DataConfig(train_samples=10), large).in_memory


def test_normalisation_is_the_sets_own_unless_named() -> None:
    own = Normalization((0.1,) * 3, (0.2,) * 3)
    assert resolve(DataConfig(), source()).normalization == IMAGENET
    assert resolve(DataConfig(), source(normalization=own)).normalization == own
    assert resolve(DataConfig(normalization="imagenet"), source(normalization=own)).normalization == IMAGENET
    named = resolve(DataConfig(normalization="cifar10"), source()).normalization
    # Of 255: 125.3, 123.0, 113.9 and 63.0, 62.1, 66.7, as every CIFAR-10 recipe has them.
    np.testing.assert_allclose(np.array(named.mean) * 255, (125.3, 123.0, 113.9), atol=0.1)
    np.testing.assert_allclose(np.array(named.std) * 255, (63.0, 62.1, 66.7), atol=0.1)


def test_where_images_are_held_changes_nothing_else() -> None:
    for fields in ({}, {"photographs": False}, {"self_augmenting": True}):
        held, along = (resolve(DataConfig(in_memory=place), source(**fields)) for place in (True, False))
        assert held == replace(along, in_memory=True)
