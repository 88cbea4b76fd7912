"""The paper's CIFAR networks against its layer counts and closed forms."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from locsgd_dist.models import ModelConfig, build_model, resnet18, to_channels_last, vgg13


def layers_in_execution_order(model: nn.Module, images: Tensor) -> list[tuple[nn.Module, int, int]]:
    """(module, multiply-adds, input elements) of every convolution and linear, as one pass runs them."""
    seen: list[tuple[nn.Module, int, int]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Each output element of a layer is a dot product over one filter.
        seen.append((module, output.numel() * module.weight[0].numel(), inputs[0].numel()))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(record)
    model(images)
    return seen


def resnet18_macs(width: int, num_classes: int) -> int:
    """Multiply-adds of one 32x32 image, written out stage by stage."""
    w = width
    stem = 32**2 * 9 * 3 * w
    stage1 = 4 * 32**2 * 9 * w * w
    later = 0
    for k, side in ((1, 16), (2, 8), (3, 4)):
        a, b = w * 2 ** (k - 1), w * 2**k
        later += side**2 * (9 * a * b + 3 * 9 * b * b + a * b)
    return stem + stage1 + later + 8 * w * num_classes


def vgg13_macs(width: int, num_classes: int) -> int:
    w = width
    channels = [3, w, w, 2 * w, 2 * w, 4 * w, 4 * w, 8 * w, 8 * w, 8 * w, 8 * w]
    sides = [32, 32, 16, 16, 8, 8, 4, 4, 2, 2]
    convs = sum(s**2 * 9 * a * b for s, a, b in zip(sides, channels, channels[1:], strict=False))
    return convs + 8 * w * num_classes


def resnet18_params(w: int, num_classes: int) -> int:
    convs = 27 * w + 4 * 9 * w * w + sum(9 * a * 2 * a + 3 * 9 * 4 * a * a + 2 * a * a for a in (w, 2 * w, 4 * w))
    norms = 2 * (w + 4 * w + 5 * (2 * w + 4 * w + 8 * w))
    return convs + norms + 8 * w * num_classes + num_classes


def vgg13_params(w: int, num_classes: int) -> int:
    channels = [3, w, w, 2 * w, 2 * w, 4 * w, 4 * w, 8 * w, 8 * w, 8 * w, 8 * w]
    convs = sum(9 * a * b + 3 * b for a, b in itertools.pairwise(channels))  # bias, norm scale, norm shift
    return convs + 8 * w * num_classes + num_classes


NETWORKS = [
    pytest.param(resnet18, resnet18_params, resnet18_macs, 21, id="resnet18"),
    pytest.param(vgg13, vgg13_params, vgg13_macs, 11, id="vgg13"),
]


@pytest.mark.parametrize(("factory", "params", "macs", "num_layers"), NETWORKS)
@pytest.mark.parametrize(("width", "num_classes"), [(64, 10), (16, 100), (3, 2)])
def test_cifar_networks_have_the_layers_parameters_and_multiply_adds_of_the_closed_form(
    factory: Callable[..., nn.Module],
    params: Callable,
    macs: Callable,
    num_layers: int,
    width: int,
    num_classes: int,
) -> None:
    with torch.device("meta"):
        model = factory(num_classes, width=width)
        assert model(torch.empty(5, 3, 32, 32)).shape == (5, num_classes)
        layers = layers_in_execution_order(model, torch.empty(1, 3, 32, 32))
    assert len(layers) == num_layers
    assert sum(p.numel() for p in model.parameters()) == params(width, num_classes)
    assert sum(m for _, m, _ in layers) == macs(width, num_classes)
    assert isinstance(layers[-1][0], nn.Linear)


# The published limits: network, image side, layers, boundaries at 50 % and 75 % of the layers (of VGG's ten
# convolutions), the share of the multiply-adds before each, the share of the layers' input bytes.
TABLE = [
    ("resnet18", 32, 21, (10, 15), (0.52, 0.76), (0.74, 0.91)),
    ("vgg13", 32, 11, (5, 7), (0.50, 0.75), (0.79, 0.92)),
    ("resnet34", 224, 37, (18, 27), (0.51, 0.76), (0.76, 0.90)),
    ("resnet50", 224, 54, (27, 40), (0.51, 0.75), (0.74, 0.89)),
    ("mobilenet_v2", 224, 53, (26, 39), (0.45, 0.70), (0.80, 0.93)),
]


@pytest.mark.parametrize(("name", "side", "num_layers", "boundaries", "flop_shares", "byte_shares"), TABLE)
def test_the_papers_networks_match_the_methods_table(
    name: str,
    side: int,
    num_layers: int,
    boundaries: tuple[int, int],
    flop_shares: tuple[float, float],
    byte_shares: tuple[float, float],
) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), 10 if side == 32 else 1000)
        layers = layers_in_execution_order(model, torch.empty(1, 3, side, side))
    assert len(layers) == num_layers
    macs = [m for _, m, _ in layers]
    inputs = [n for _, _, n in layers]
    for boundary, flop_share, byte_share in zip(boundaries, flop_shares, byte_shares, strict=True):
        assert sum(macs[:boundary]) / sum(macs) == pytest.approx(flop_share, abs=0.0051)
        assert sum(inputs[:boundary]) / sum(inputs) == pytest.approx(byte_share, abs=0.0051)


def test_parameter_names_are_torchvisions() -> None:
    with torch.device("meta"):
        ours, theirs = resnet18(1000).state_dict(), torchvision.models.resnet18().state_dict()
        vgg_ours, vgg_theirs = vgg13(10).state_dict(), torchvision.models.vgg13_bn().state_dict()
    assert ours.keys() == theirs.keys()
    assert {k for k in ours if ours[k].shape != theirs[k].shape} == {"conv1.weight"}  # 3x3 instead of 7x7
    features = {k: v.shape for k, v in vgg_ours.items() if k.startswith("features.")}
    assert features == {k: v.shape for k, v in vgg_theirs.items() if k.startswith("features.")}


def test_resnet18_computes_what_torchvisions_does_without_its_larger_stem() -> None:
    torch.manual_seed(0)
    ours, theirs = resnet18(7).eval(), torchvision.models.resnet18(num_classes=7).eval()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("factory", [resnet18, vgg13])
def test_initialisation_is_he_by_fan_out(factory: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    for module in factory(10).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            # The sample deviation of n normal draws has a relative error of 1/sqrt(2n): 2.2 % at n = 1000.
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_channels_last_is_refused_where_torch_corrupts_memory() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"train\.channels_last=true needs .* at least 8 channels .* conv1 has 4"):
        to_channels_last(build_model(ModelConfig(name="resnet18", width=4), 10), cpu)
    model = build_model(ModelConfig(name="resnet18", width=8), 10)
    to_channels_last(model, cpu)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
