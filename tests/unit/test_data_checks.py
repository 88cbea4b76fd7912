"""What a user reads when the `data` section cannot work, and the shapes that are known without decoding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import build, write_image_folder, write_mnist
from PIL import Image

from locsgd_dist.data import DataConfig, DataShape, check_data, data_shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_samples": 0}, r"data\.train_samples must be at least 1 \(or null\), got 0"),
        ({"image_size": -3}, r"data\.image_size must be at least 1 \(or null\), got -3"),
        ({"val_batch": 0}, r"data\.val_batch must be at least 1 \(or null\), got 0"),
        ({"mixup_alpha": -0.1}, r"data\.mixup_alpha must be 0 \(off\) or positive and finite, got -0\.1"),
        ({"cutmix_alpha": float("nan")}, r"data\.cutmix_alpha must be .*, got nan"),
        ({"workers": -2}, r"data\.workers must be -1 .* or at least 0, got -2"),
        ({"kwargs": {"a": 1}}, r"data\.kwargs is for data\.name=package\.module:factory only, got data\.name=digits"),
    ],
)
def test_impossible_values_are_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        DataConfig(**fields)
    assert "\n" not in str(caught.value)


def check_message(config: DataConfig) -> str:
    """The one line of `check_data`, which is the same that `build_data` fails with."""
    with pytest.raises(ValueError, match=r"^data\.") as caught:
        check_data(config)
    with pytest.raises(ValueError, match=r"^data\.") as built:
        build(config)
    assert str(built.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_is_met_with_the_known_ones() -> None:
    message = check_message(DataConfig(name="cifar-10"))
    assert message == (
        "data.name must be one of digits, cifar10, cifar100, mnist, fashion_mnist, imagefolder "
        "or package.module:factory, got 'cifar-10' (did you mean cifar10?)"
    )
    assert "did you mean" not in check_message(DataConfig(name="zzz"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_missing_standard_files_are_named_and_may_be_fetched(tmp_path: Path, name: str) -> None:
    message = check_message(DataConfig(name=name, root=str(tmp_path)))
    assert message.startswith(f"data.root: {name} needs '{tmp_path}/")
    assert message.endswith("data.download=true")
    check_data(DataConfig(name=name, root=str(tmp_path), download=True))
    assert not any(tmp_path.iterdir())


def test_standard_files_that_are_there_are_enough(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    check_data(DataConfig(name="mnist", root=str(tmp_path), train_samples=60_000))
    with pytest.raises(ValueError, match=r"^data\.train_samples must be at most 60000, .* of mnist, got 60001$"):
        check_data(DataConfig(name="mnist", root=str(tmp_path), train_samples=60_001))


def test_an_image_folder_must_be_laid_out_as_expected(tmp_path: Path) -> None:
    def message(root: Path, **fields: Any) -> str:
        return check_message(DataConfig(name="imagefolder", root=str(root), image_size=16, **fields))

    expected = "expected train/CLASS/ and val/CLASS/ (or test/CLASS/)"
    assert message(tmp_path / "none") == f"data.root: '{tmp_path}/none' has no train/; {expected}"
    write_image_folder(tmp_path / "set")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train").symlink_to(tmp_path / "set" / "train")
    assert message(tmp_path / "half") == f"data.root: '{tmp_path}/half' has no val/ or test/; {expected}"
    assert "train_samples must be at most 15" in message(tmp_path / "set", train_samples=16)
    (tmp_path / "set" / "val" / "class3").mkdir()
    assert message(tmp_path / "set").endswith("must hold the same classes; 'class3' is in one only")
    for split in ("train", "val"):
        (tmp_path / "bare" / split).mkdir(parents=True)
    assert message(tmp_path / "bare").endswith("must hold one folder per class, got none")


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "class3").mkdir()
    with pytest.raises(ValueError, match=r"^data\.root: .*class3") as caught:
        build(DataConfig(name="imagefolder", root=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train" / "class1" / "0003.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"cannot decode .*class1/0003\.png"):
        build(DataConfig(name="imagefolder", root=str(tmp_path), image_size=16, cache=False))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("no_such_module:f", {}, "data.name: cannot import 'no_such_module': No module named 'no_such_module'"),
        ("data_sets:missing", {}, "data.name: module 'data_sets' has no callable 'missing'"),
        ("data_sets:Numbered", {"sides": 3}, "data.kwargs do not fit data_sets:Numbered: "),
        ("data_sets:Labelled", {"targets": ()}, "data.name: data_sets:Labelled gave a split without samples"),
        ("data_sets:Labelled", {"targets": (0, -1)}, "data.name: classes of data_sets:Labelled must lie in [0, 1)"),
        ("data_sets:Anonymous", {}, "data.name: the data set of data_sets:Anonymous must have num_classes, classes "),
        ("data_sets:Labelled", {"sample": np.zeros((8, 8, 3))}, "data.name: a factory's images must be PIL images"),
        ("data_sets:Labelled", {"sample": torch.zeros(8, 8, 3)}, "data.name: a factory's images must be PIL images"),
        ("data_sets:Labelled", {"sample": torch.zeros(8, 8)}, "data.name: a factory's images must be PIL images"),
        ("data_sets:Labelled", {"sample": torch.zeros(3, 8, 8).long()}, "data.name: a factory's image tensors must"),
    ],
)
def test_a_data_set_of_ones_own_is_checked(name: str, kwargs: dict[str, Any], message: str) -> None:
    assert check_message(DataConfig(name=name, kwargs=kwargs)).startswith(message)


def test_a_subset_needs_to_know_the_classes() -> None:
    message = check_message(DataConfig(name="data_sets:Unlabelled", train_samples=3))
    assert message == "data.train_samples needs targets, the class of each sample, which data_sets:Unlabelled lacks"
    assert build(DataConfig(name="data_sets:Unlabelled", workers=0)).num_train == 6


def test_float_images_are_not_resized_held_or_cropped_out_of() -> None:
    def failing(**fields: Any) -> str:
        bundle_of = DataConfig(name="data_sets:Floats", workers=0, **fields)
        with pytest.raises(ValueError, match=r"^data\.") as caught:
            next(iter(build(bundle_of).train))
        return str(caught.value)

    assert failing(image_size=32).startswith("data.image_size=32 needs float images of that size")
    assert failing(in_memory=True) == "data.in_memory=true holds uint8 images, but the factory gave torch.float32"
    assert failing(augmentation="imagenet_paper").startswith("data.augmentation=imagenet_* needs PIL or uint8")


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"name": "imagefolder"}, "auto, which for images of 224 pixels is imagenet_paper"),
        ({"name": "mnist", "augmentation": "imagenet_paper"}, "imagenet_paper, which for images of 32 pixels is "),
        ({"name": "digits", "augmentation": "imagenet_torchvision"}, "imagenet_torchvision, which for images of 32 "),
    ],
)
def test_what_is_held_in_memory_needs_an_augmentation_for_it(tmp_path: Path, fields: dict[str, Any], got: str) -> None:
    write_image_folder(tmp_path, per_class=1)
    write_mnist(tmp_path / "MNIST" / "raw")
    message = check_message(DataConfig(root=str(tmp_path), in_memory=True, **fields))
    allowed = "data.in_memory=true needs data.augmentation none, crop_flip or crop_flip_cutout, got "
    assert message.startswith(allowed + got)


def test_a_download_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^data\.download: cannot fetch cifar10 into '.*/file/data': ") as caught:
        build(DataConfig(name="cifar10", root=str(tmp_path / "file" / "data"), download=True))
    assert "\n" not in str(caught.value)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_image_folder(tmp_path / "set")
    write_mnist(tmp_path / "MNIST" / "raw")
    for config in (DataConfig(name="imagefolder", root="~/set"), DataConfig(name="mnist", root="~")):
        check_data(config)
        assert build(config, batch=5).num_val > 0


def test_shapes_are_known_without_data(tmp_path: Path) -> None:
    assert data_shape(DataConfig()) == DataShape(num_classes=10, channels=3, image_size=32)
    assert data_shape(DataConfig(name="cifar100", root="nowhere")) == DataShape(100, 32)
    assert data_shape(DataConfig(name="mnist", root="nowhere", image_size=28)) == DataShape(10, 28)
    assert data_shape(DataConfig(name="data_sets:Labelled")) == DataShape(3, 8)
    assert data_shape(DataConfig(name="data_sets:Labelled", image_size=12)) == DataShape(3, 12)
    with pytest.raises(ValueError, match=r"^data\.root: .* has no train/"):
        data_shape(DataConfig(name="imagefolder", root=str(tmp_path)))
    write_image_folder(tmp_path, num_classes=4)
    assert data_shape(DataConfig(name="imagefolder", root=str(tmp_path))) == DataShape(4, 224)
    with pytest.raises(ValueError, match=r"^data\.name must be one of"):
        data_shape(DataConfig(name="imagenet"))


def test_shape_and_bundle_agree(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    Image.new("L", (40, 30)).save(tmp_path / "train" / "class0" / "grey.png")
    for config in (
        DataConfig(),
        DataConfig(image_size=16),
        DataConfig(name="imagefolder", root=str(tmp_path), image_size=24, cache=False),
        DataConfig(name="data_sets:Numbered", kwargs={"side": 20}),
    ):
        shape, bundle = data_shape(config), build(config)
        assert bundle.input_shape == (shape.channels, shape.image_size, shape.image_size)
        assert bundle.num_classes == shape.num_classes
        bundle.close()
