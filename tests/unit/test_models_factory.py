"""Where ``model.name`` and ``model.weights`` lead, against torchvision and timm; and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
from safetensors.torch import save_file
from torch import nn

from locsgd_dist.models import ModelConfig, build_model, check_model, resnet18

USER_MODULE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, hidden=4):
        super().__init__(nn.Flatten(), nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

def make(num_classes, **kwargs):
    return Net(num_classes, **kwargs)

def broken(num_classes):
    return "not a module"

not_callable = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_networks"


def save(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def assert_same_network(ours: nn.Module, theirs: nn.Module) -> None:
    """Same parameters and buffers, each of the same shape, and interchangeable weights."""
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("prefix", ["", "torchvision:"])
def test_imagenet_networks_are_torchvisions(name: str, prefix: str) -> None:
    with torch.device("meta"):
        ours = build_model(ModelConfig(name=prefix + name), num_classes=17)
        assert_same_network(ours, torchvision.models.get_model(name, num_classes=17))


def test_torchvision_prefix_reaches_its_resnet18_and_its_arguments() -> None:
    config = ModelConfig(name="torchvision:vit_b_16", kwargs={"image_size": 32, "dropout": 0.5})
    with torch.device("meta"):
        ours = build_model(config, num_classes=10)
        theirs = torchvision.models.vit_b_16(num_classes=10, image_size=32)
        assert_same_network(ours, theirs)
        big_stem = build_model(ModelConfig(name="torchvision:resnet18"), num_classes=10)
    assert ours.encoder.dropout.p == 0.5
    assert big_stem.conv1.kernel_size == (7, 7)


def test_timm_prefix() -> None:
    config = ModelConfig(name="timm:resnet10t", kwargs={"drop_rate": 0.25})
    check_model(config)
    ours = build_model(config, num_classes=6)
    assert_same_network(ours, timm.create_model("resnet10t", num_classes=6))
    assert ours.drop_rate == 0.25


def test_own_factory_gets_num_classes_and_kwargs(user_module: str) -> None:
    config = ModelConfig(name=f"{user_module}:make", kwargs={"hidden": 9})
    check_model(config)
    model = build_model(config, num_classes=5)
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [9, 5]
    assert isinstance(build_model(ModelConfig(name=f"{user_module}:Net"), 5), nn.Sequential)


def test_width_narrows_the_cifar_networks() -> None:
    assert build_model(ModelConfig(width=12), 10).fc.in_features == 96
    assert build_model(ModelConfig(name="vgg13"), 10).classifier.in_features == 512


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "resnet81"}, "model.name resnet81 is unknown (did you mean resnet18"),
        ({"name": "resnet101"}, "model.name resnet101 is unknown (did you mean torchvision:resnet101"),
        ({"name": "zzz"}, "model.name zzz is unknown; bare names are resnet18, vgg13, resnet34, resnet50"),
        ({"name": "torchvision:resnet_50"}, "did you mean torchvision:resnet50"),
        ({"name": "torchvision:fcn_resnet50"}, "is no classifier of torchvision"),
        ({"name": "torchvision:inception_v3"}, "model.kwargs must set aux_logits: false"),
        ({"name": "timm:resnet5O"}, "is unknown to timm (did you mean timm:resnet50"),
        ({"name": "no_such.module:make"}, "no_such.module:make: there is no module no_such.module"),
        ({"name": "my_networks:mkae"}, "has no such factory (did you mean my_networks:make?)"),
        ({"name": "my_networks:not_callable"}, "my_networks has no such factory"),
        ({"name": "my_networks:"}, "my_networks has no such factory"),
        ({"name": ":make"}, "model.name :make must read package.module:factory"),
        ({"name": "my_networks:Net", "kwargs": {"hiden": 3}}, "unexpected keyword argument 'hiden'"),
        ({"kwargs": {"depth": 3}}, "model.kwargs does not fit resnet18: "),
        ({"name": "resnet50", "kwargs": {"depth": 3}}, "model.kwargs does not fit resnet50: "),
        ({"name": "resnet50", "kwargs": {"weights": "DEFAULT"}}, "must not contain weights: use"),
        ({"name": "resnet50", "width": 16}, "model.width must be null for resnet50: it is a setting"),
        ({"weights": "DEFAULT"}, "model.weights=DEFAULT exists for torchvision: and timm: networks only"),
        ({"name": "timm:test_vit.x"}, "model.name timm:test_vit.x is unknown to timm"),
        ({"name": "timm:resnet26t_v9", "weights": "DEFAULT"}, "unknown to timm"),
        ({"name": "timm:coatnet_0_224", "weights": "DEFAULT"}, "no pretrained weights for coatnet_0_224"),
        ({"weights": "missing.pt"}, "no file missing.pt"),
    ],
)  # fmt: skip
def test_check_model_names_the_key_and_the_remedy(user_module: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="model") as caught:
        check_model(ModelConfig(**config))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "model.width must be at least 1, got 0"),
        ({"name": ""}, "model.name must name a network"),
        ({"weights": ""}, "model.weights must be DEFAULT, a path or null"),
        ({"kwargs": {"num_classes": 3}}, "model.kwargs must not contain num_classes"),
    ],
)
def test_config_refuses_impossible_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_default_weights_are_known_to_exist_without_a_download() -> None:
    for name in ("resnet50", "torchvision:vit_b_16", "timm:resnet18.a1_in1k"):
        check_model(ModelConfig(name=name, weights="DEFAULT"))


def test_a_missing_import_inside_the_users_module_stays_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        check_model(ModelConfig(name="half_installed:make"))


def test_factory_must_return_a_module(user_module: str) -> None:
    with pytest.raises(ValueError, match=r"must return a torch\.nn\.Module, got str"):
        build_model(ModelConfig(name=f"{user_module}:broken"), 3)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "ddp", "safetensors"])
def test_weights_of_every_container_are_loaded(tmp_path: Path, wrap: str) -> None:
    torch.manual_seed(1)
    trained = resnet18(10, width=4)
    state: dict[str, Any] = dict(trained.state_dict())
    if wrap == "safetensors":
        path = str(tmp_path / "weights.safetensors")
        save_file(state, path)
    else:
        wrapped = {
            "plain": state,
            "state_dict": {"state_dict": state, "epoch": 3},
            "model": {"model": state},
            "ddp": {f"module.{k}": v for k, v in state.items()},
        }[wrap]
        path = save(wrapped, tmp_path / "weights.pth")
    config = ModelConfig(width=4, weights=path)
    check_model(config)
    torch.manual_seed(2)
    loaded = build_model(config, 10)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet18", "fc"), ("torchvision:mobilenet_v2", "classifier.1"), ("vgg13", "classifier")],
)
def test_a_head_for_other_classes_is_replaced_and_said_so(
    tmp_path: Path, name: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained = build_model(ModelConfig(name=name), 12).state_dict()
    path = save(pretrained, tmp_path / "weights.pt")
    torch.manual_seed(3)
    fresh = build_model(ModelConfig(name=name), 10).state_dict()
    torch.manual_seed(3)
    with caplog.at_level(logging.INFO):
        loaded = build_model(ModelConfig(name=name, weights=path), 10).state_dict()
    for key, value in loaded.items():
        expected = fresh if key.rpartition(".")[0] == head else pretrained
        assert torch.equal(value, expected[key]), key
    assert f"is for 12 classes; {head}, for 10, starts from its initialisation" in caplog.text


def test_a_head_of_the_same_size_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pretrained = resnet18(10, width=4)
    path = save(pretrained.state_dict(), tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO):
        loaded = build_model(ModelConfig(width=4, weights=path), 10)
    assert torch.equal(loaded.fc.weight, pretrained.fc.weight)
    assert caplog.text == ""


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: without(s, "layer1.0.conv1.weight"), "1 missing (layer1.0.conv1.weight)"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, "1 unexpected (extra.weight)"),
        (lambda s: {**s, "conv1.weight": torch.zeros(4, 3, 7, 7)}, "(conv1.weight (4, 3, 7, 7), not (4,"),
        (lambda s: resnet18(10, width=5).state_dict(), "misshapen (conv1.weight"),
        (lambda s: {**s, "fc.weight": torch.zeros(10, 31)}, "(fc.weight (10, 31), not (10, 32))"),
        (lambda s: [1, 2], "must hold a state_dict"),
        (lambda s: {"epoch": 3}, "must hold a state_dict"),
        (lambda s: {"model": resnet18(10, 4)}, "is damaged or holds more than tensors"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_one_clear_line(tmp_path: Path, spoil: Any, message: str) -> None:
    path = save(spoil(resnet18(10, width=4).state_dict()), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"model\.weights") as caught:
        build_model(ModelConfig(width=4, weights=path), 10)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_weights_file_is_one_clear_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"not what its name says")
    with pytest.raises(ValueError, match=r"model\.weights") as caught:
        build_model(ModelConfig(width=4, weights=str(path)), 10)
    assert "\n" not in str(caught.value)
