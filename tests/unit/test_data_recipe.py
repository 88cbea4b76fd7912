"""What the section leaves to the data set: augmentation, place and normalisation of each kind of set."""

from dataclasses import replace

import numpy as np
import pytest

from locsgd_dist.data import DataConfig, Normalization
from locsgd_dist.data.augment import CropFlip
from locsgd_dist.data.decode import measure
from locsgd_dist.data.items import ArrayItems
from locsgd_dist.data.recipe import resolve, resolve_normalization
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


def test_normalisation_is_the_sets_own_or_measured_or_imagenets() -> None:
    own, measured = Normalization((0.1,) * 3, (0.2,) * 3), Normalization((0.3,) * 3, (0.4,) * 3)
    assert resolve_normalization(DataConfig(), source(normalization=own), measured) == own
    assert resolve_normalization(DataConfig(), source(), measured) == measured
    assert resolve_normalization(DataConfig(), source(), None) == IMAGENET
    assert resolve_normalization(DataConfig(normalization="imagenet"), source(normalization=own), measured) == IMAGENET


@pytest.mark.parametrize("channels", [1, 3])
def test_measured_moments_are_those_of_all_pixels(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5000, 4, 3, channels), dtype=np.uint8)
    images[..., 0] //= 2
    measured = measure(images)
    expected = images.reshape(-1, channels) / 255
    np.testing.assert_allclose(measured.mean, np.broadcast_to(expected.mean(0), 3), rtol=1e-12)
    np.testing.assert_allclose(measured.std, np.broadcast_to(expected.std(0), 3), rtol=1e-12)


def test_a_channel_that_never_varies_can_be_divided_by() -> None:
    assert measure(np.full((3, 2, 2, 1), 51, dtype=np.uint8)) == Normalization((0.2,) * 3, (1.0,) * 3)
