"""The data sets by name, decoded from their real formats, against torchvision's and scikit-learn's own readers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import Floats, Numbered, build, write_cifar, write_image_folder, write_mnist
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from locsgd_dist.data import DataBundle, DataConfig, Normalization
from locsgd_dist.data.items import ArrayItems
from locsgd_dist.data.sources import digits, open_source
from locsgd_dist.data.standard_sets import STANDARD_SETS


def pixels(bundle: DataBundle, images: Tensor) -> Tensor:
    """Undo the normalisation: floats in 0..255."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (bundle.normalization.mean, bundle.normalization.std)
    )
    return (images * std + mean) * 255


def test_digits_are_scikit_learns_split_by_class() -> None:
    source, whole = digits(), load_digits()
    assert isinstance(source.train, ArrayItems)
    assert isinstance(source.val, ArrayItems)
    # Each of the 1797 is in one split, with its own label.
    seen = sorted(
        (tuple(image.flatten().tolist()), int(target))
        for items in (source.train, source.val)
        for image, target in zip(items.images, items.targets, strict=True)
    )
    due = sorted(
        (tuple(int(value * 255 / 16 + 0.5) for value in image.flatten()), int(target))
        for image, target in zip(whole.images, whole.target, strict=True)
    )
    assert seen == due
    shares = np.bincount(source.val.targets) / np.bincount(whole.target)
    assert (abs(shares - 0.2) < 0.005).all()


def test_digits_arrive_at_32_pixels_in_three_equal_channels_without_a_flip() -> None:
    bundle = build(DataConfig(augmentation="none", train_samples=64), batch=64)
    (batch,) = bundle.train
    assert bundle.input_shape == (3, 32, 32)
    assert batch.images.shape == (64, 3, 32, 32)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    grey = pixels(bundle, batch.images)[:, 0]
    small = functional.resize(grey[:, None], [8, 8])[:, 0] / 255 * 16
    originals = torch.tensor(load_digits().images, dtype=torch.float32)
    nearest = (small[:, None] - originals[None]).abs().mean(dim=(2, 3)).argmin(dim=1)
    assert torch.equal(torch.tensor(load_digits().target)[nearest], batch.targets)


def test_digits_are_normalised_to_mean_0_and_deviation_1() -> None:
    (batch,) = build(DataConfig(augmentation="none"), batch=2000).train
    assert abs(batch.images.mean()) < 1e-3
    assert abs(batch.images.std() - 1) < 1e-3


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_files_are_read_as_torchvision_does(tmp_path: Path, name: str) -> None:
    folder = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
    written = write_mnist(tmp_path / folder / "raw")
    reader = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
    bundle = build(DataConfig(name=name, root=str(tmp_path), augmentation="none", image_size=28), batch=20)
    assert (bundle.num_train, bundle.num_val, bundle.num_classes) == (20, 10, 10)
    (batch,) = bundle.val
    expected = torch.stack([functional.pil_to_tensor(image) for image, _ in reader(tmp_path, train=False)])
    assert torch.equal(expected[:, 0], torch.from_numpy(written["t10k"][0]))
    torch.testing.assert_close(pixels(bundle, batch.images), expected.expand(-1, 3, -1, -1).float(), atol=1e-3, rtol=0)
    assert batch.targets.tolist() == written["t10k"][1].tolist()
    (train,) = bundle.train
    assert sorted(train.targets.tolist()) == sorted(written["train"][1].tolist())


def test_mnist_is_resized_to_32_pixels(tmp_path: Path) -> None:
    written = write_mnist(tmp_path / "MNIST" / "raw")
    bundle = build(DataConfig(name="mnist", root=str(tmp_path)))
    batch = next(iter(bundle.val))
    expected = functional.resize(torch.from_numpy(written["t10k"][0][:, None]), [32, 32], antialias=True)
    torch.testing.assert_close(pixels(bundle, batch.images)[:, :1], expected.float(), atol=1e-3, rtol=0)


class TinyCifar10(datasets.CIFAR10):
    """torchvision's reader without the checksums that only the real files meet."""

    train_list = [[name, None] for name, _ in datasets.CIFAR10.train_list]
    test_list = [[name, None] for name, _ in datasets.CIFAR10.test_list]
    meta = datasets.CIFAR10.meta | {"md5": None}


class TinyCifar100(datasets.CIFAR100):
    train_list = [[name, None] for name, _ in datasets.CIFAR100.train_list]
    test_list = [[name, None] for name, _ in datasets.CIFAR100.test_list]
    meta = datasets.CIFAR100.meta | {"md5": None}


@pytest.mark.parametrize(
    ("name", "reader", "label_key"), [("cifar10", TinyCifar10, "labels"), ("cifar100", TinyCifar100, "fine_labels")]
)
def test_cifar_files_are_read_as_torchvision_does(
    tmp_path: Path, name: str, reader: type[datasets.CIFAR10], label_key: str
) -> None:
    spec = replace(STANDARD_SETS[name], dataset=reader)
    files = [file for file, _ in reader.train_list + reader.test_list]
    written = write_cifar(tmp_path / spec.folder, files, reader.meta["filename"], label_key=label_key)
    assert {*files, reader.meta["filename"]} == set(spec.files)
    for train, split in ((True, files[:-1]), (False, files[-1:])):
        items = spec.load(tmp_path, train=train, download=False)
        rows = np.concatenate([written[file][0] for file in split])
        labels = np.concatenate([written[file][1] for file in split])
        assert (items.images.transpose(0, 3, 1, 2).reshape(-1, 3072) == rows).all()
        assert (items.targets == labels).all()
        for index, (image, target) in enumerate(reader(tmp_path, train=train)):
            picture, label = items[index]
            assert torch.equal(picture, functional.pil_to_tensor(image))
            assert label == target


def test_corrupt_standard_files_are_told_from_missing_ones(tmp_path: Path) -> None:
    spec = STANDARD_SETS["cifar10"]
    with pytest.raises(ValueError, match=r"^data\.root: cifar10 needs .*data_batch_1', which is not there; .*download"):
        open_source(DataConfig(name="cifar10", root=str(tmp_path)))
    files = [file for file, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list]
    write_cifar(tmp_path / spec.folder, files, "batches.meta", label_key="labels")
    with pytest.raises(ValueError, match=r"^data\.root: .*cifar-10-batches-py' is corrupt"):
        open_source(DataConfig(name="cifar10", root=str(tmp_path)))


@pytest.mark.parametrize("val", ["val", "test"])
@pytest.mark.parametrize("cache", [True, False])
def test_image_folders_are_read_as_torchvision_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val: str, cache: bool
) -> None:
    monkeypatch.setenv("LOCSGD_CACHE", str(tmp_path / "cache"))
    write_image_folder(tmp_path / "set", size=(20, 12), val=val)
    bundle = build(DataConfig(name="imagefolder", root=str(tmp_path / "set"), image_size=16, cache=cache), batch=15)
    assert bundle.num_classes == 3
    assert (tmp_path / "cache").exists() == cache
    reader = datasets.ImageFolder(tmp_path / "set" / val, transform=v2.Compose([v2.Resize(16), v2.CenterCrop(16)]))
    (batch,) = bundle.val
    expected = torch.stack([functional.pil_to_tensor(image) for image, _ in reader]).float()
    torch.testing.assert_close(pixels(bundle, batch.images), expected, atol=1e-3, rtol=0)
    assert batch.targets.tolist() == reader.targets


def test_train_samples_take_the_same_balanced_subset_for_every_seed(tmp_path: Path) -> None:
    config = DataConfig(train_samples=100, augmentation="none")
    subsets = []
    for seed in (0, 1):
        (batch,) = build(config, batch=100, seed=seed).train
        assert batch.targets.bincount().tolist() == [10] * 10
        subsets.append({tuple(image.flatten().tolist()) for image in batch.images})
    assert len(subsets[0]) == 100
    assert subsets[0] == subsets[1]
    (other,) = build(replace(config, subset_seed=1), batch=100).train
    assert {tuple(image.flatten().tolist()) for image in other.images} != subsets[0]


@pytest.mark.parametrize("in_memory", ["auto", True])
def test_a_data_set_of_ones_own(in_memory: Any) -> None:
    config = DataConfig(name="data_sets:Numbered", kwargs={"num": 12, "channels": 1}, in_memory=in_memory, workers=0)
    bundle = build(config, batch=12)
    # What it does at random would freeze in memory, so it stays where it is unless asked for.
    assert (bundle.resident_bytes > 0) == (in_memory is True)
    assert bundle.input_shape == (3, 16, 16)
    (batch,) = bundle.train
    expected = Numbered("train", num=12, channels=1).images[batch.targets].expand(-1, 3, -1, -1)
    torch.testing.assert_close(pixels(bundle, batch.images), expected.float(), atol=1e-3, rtol=0)


def test_a_data_set_of_ones_own_may_bring_its_normalisation_and_its_pictures() -> None:
    bundle = build(DataConfig(name="data_sets:NoisyPictures", workers=0), batch=50)
    assert bundle.normalization == Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    (first,) = bundle.train
    assert -2 <= first.images.min() < first.images.max() <= 2
    bundle.train.set_epoch(0)
    (again,) = bundle.train
    assert torch.equal(first.images, again.images)
    bundle.train.set_epoch(1)
    (second,) = bundle.train
    order = [batch.targets.argsort() for batch in (first, second)]
    assert not torch.equal(first.images[order[0]], second.images[order[1]])


def test_float_images_of_ones_own_are_not_normalised() -> None:
    bundle = build(DataConfig(name="data_sets:Floats", workers=0), batch=50)
    (batch,) = bundle.train
    assert torch.equal(batch.images, Floats("train").images[batch.targets] / 255)
