"""A network taken apart behind its resting layers, held against the network whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models
from localized_networks import sequence_network, timm_swin, timm_vision_transformer, vision_transformer
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from locsgd_dist.localized import LocalizedLearner, find_cut
from locsgd_dist.localized.layers import trace_layers
from locsgd_dist.models import resnet18, vgg13


def without_drops(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(10, width=8),
    "vgg13": lambda: vgg13(10, width=8),
    "torchvision resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "torchvision densenet121": lambda: torchvision.models.densenet121(num_classes=10),
    "torchvision vision transformer": vision_transformer,
    "timm vision transformer": timm_vision_transformer,
    "timm swin": lambda: without_drops(timm_swin()),
}
EXAMPLE = torch.zeros(1, 3, 32, 32)


def images(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("part", [0.35, 0.75])
@pytest.mark.parametrize("name", NETWORKS)
def test_behind_a_cut_the_network_answers_as_it_would_to_the_images_that_were_kept(name: str, part: float) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    learner = LocalizedLearner(model, EXAMPLE, rule="frozen", hold_statistics=True)
    boundary = int(part * len(learner.layers))
    learner.advance(boundary)
    learner.train()
    cut = find_cut(model, learner.layers, boundary, EXAMPLE)
    assert cut is not None
    # Few layers are between the boundary and the cut: a block's at most.
    assert boundary - 8 <= cut.num_layers <= boundary

    def gradients(run: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)  # of dropout behind the cut
        model.zero_grad()
        run().square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def behind() -> Tensor:
        outputs = cut.outputs(images(2))
        assert len(outputs) == 4
        with cut.behind(outputs):
            return model(images(3))

    statistics = [buffer.clone() for buffer in model.buffers()]
    kept = gradients(behind)
    after = [buffer.clone() for buffer in model.buffers()]
    for buffer, before in zip(model.buffers(), statistics, strict=True):
        buffer.copy_(before)
    whole = gradients(lambda: model(images(2)))
    assert len(kept) == len(whole) > 0
    for ours, expected in zip(kept, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    for ours, expected in zip(after, model.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class CountedConvolution(nn.Conv2d):
    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Scale(nn.Module):
    """Nothing but its size tells that what it gives is not of images."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self) -> Tensor:
        return self.scale * 2


class Ways(nn.Module):
    """One activation, shared by all of a network, and ways around its first two layers."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.first, self.second, self.third = (CountedConvolution(3, 3, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU()
        if way == "a gate that is still shut":
            self.gate = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "in place":
            y = nn.functional.relu(self.second(nn.functional.relu(self.first(x), inplace=True)), inplace=True)
        else:
            first = self.relu(self.first(x))
            self.remembered = first
            y = self.relu(self.second(first))
        z = self.relu(self.third(y))
        match self.way:
            case "images to the end":
                z = z + x
            case "brightness to the end":
                z = z * x.mean()
            case "a gate that is still shut":
                z = z + self.gate * x
            case "in training alone":
                z = z * (1 + x.mean()) if self.training else z
            case "in evaluation alone":
                z = z if self.training else z + x
            case "zeros of the first layer":
                z = z * (self.remembered != 0)
            case "the first layer, far away":
                z = torch.where(self.remembered > 50, -z, z)
        return self.head(z.mean(dim=(2, 3)))


def cut_of(model: nn.Module, boundary: int) -> Any:
    return find_cut(model, trace_layers(model, EXAMPLE), boundary, EXAMPLE)


@pytest.mark.parametrize("way", ["straight", "in place", "in evaluation alone"])
def test_layers_before_the_cut_do_not_run_behind_it_and_a_shared_activation_does(way: str) -> None:
    torch.manual_seed(0)
    model = Ways(way)
    cut = cut_of(model, 2)
    assert cut is not None
    assert cut.num_layers == 2
    outputs, expected = cut.outputs(images(2)), model(images(2))
    before = model.first.runs, model.second.runs, model.third.runs
    with cut.behind(outputs):
        torch.testing.assert_close(model(images(3)), expected)
    assert (model.first.runs, model.second.runs, model.third.runs) == (before[0], before[1], before[2] + 1)


@pytest.mark.parametrize(
    ("way", "num_layers"),
    [
        ("images to the end", 0),
        ("brightness to the end", 0),
        ("a gate that is still shut", 0),
        ("in training alone", 0),
        # what the first layer says is there behind a cut after it
        ("zeros of the first layer", 1),
        ("the first layer, far away", 1),
    ],
)
@pytest.mark.parametrize("zero_head", [False, True])
def test_a_network_is_not_cut_where_there_is_a_way_around(way: str, num_layers: int, zero_head: bool) -> None:
    torch.manual_seed(0)
    model = Ways(way)
    if zero_head:  # as a new classifier may be: what the network gives then tells nothing
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    cut = cut_of(model, 2)
    assert (0 if cut is None else cut.num_layers) == num_layers


@pytest.mark.parametrize("channels", [3, 5, 7, 10, 35])
def test_what_does_not_grow_with_the_images_is_no_output_of_theirs(channels: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale = nn.Conv2d(3, channels, 3), Scale(channels)
            self.second, self.third = nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x) * self.scale())).mean(dim=(2, 3))

    torch.manual_seed(0)
    model = Scaled()
    cut = cut_of(model, 2)
    assert cut is not None
    assert cut.num_layers == 1  # behind the first layer, before the scale
    for count in (1, 4, 8):
        with cut.behind(cut.outputs(images(2, count))):
            torch.testing.assert_close(model(images(3, count)), model.forward(images(2, count)))


def test_no_layer_no_cut_and_something_is_left_behind_it() -> None:
    model = resnet18(10, width=8).eval()
    layers = trace_layers(model, EXAMPLE)
    assert find_cut(model, layers, 0, EXAMPLE) is None
    cut = find_cut(model, layers, len(layers), EXAMPLE)
    assert cut is not None
    assert cut.num_layers < len(layers)


def test_to_look_for_a_cut_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 28 * 28, 10),
    ).train()
    layers = trace_layers(model, EXAMPLE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    states = torch.random.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert find_cut(model, layers, 2, EXAMPLE) is None  # batch statistics, and a norm that moves with each pass
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("hold", [False, True])
def test_outputs_repeat_where_statistics_are_held(hold: bool) -> None:
    torch.manual_seed(0)
    model = resnet18(10, width=8)
    learner = LocalizedLearner(model, EXAMPLE, rule="frozen", hold_statistics=hold)
    learner.advance(9)
    learner.train()
    cut = find_cut(model, learner.layers, 9, EXAMPLE)
    # Where they move, up to the first batch norm's input at most.
    assert cut is not None
    assert cut.num_layers == (8 if hold else 1)
    torch.testing.assert_close(cut.outputs(images(2))[:1], cut.outputs(images(2)[:1]))


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[], float]):
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x if self.draw() > 0.001 else x * 2


@pytest.mark.parametrize(
    "drawing",
    [
        nn.Dropout2d(0.01),
        StochasticDepth(0.001, "row"),
        Drawing(lambda: float(torch.rand(()))),
        Drawing(random.random),
        Drawing(np.random.random),
    ],
    ids=["dropout", "stochastic depth", "torch", "python", "numpy"],
)
def test_layers_that_draw_are_cut_before_they_do_however_rarely_it_shows(drawing: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), drawing, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 26 * 26, 10)
    ).train()
    cut = cut_of(model, 3)
    assert cut is not None
    assert cut.num_layers == 2
    assert cut.module is model[1]


class Remembering(nn.Module):
    """Its first block keeps its activation on itself, and the last layer reads it there."""

    def __init__(self, by: str):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.by = by
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)
        self.block[0].register_forward_hook(self.remember)
        self.remembered = torch.zeros(())

    def remember(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.remembered = output

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.block(x))
        return self.head((y + self.remembered if self.by == "sum" else y * self.remembered).mean(dim=(2, 3)))


@pytest.mark.parametrize("by", ["sum", "product"])
def test_what_a_module_remembers_of_a_pass_is_a_way_around(by: str) -> None:
    torch.manual_seed(0)
    cut = cut_of(Remembering(by), 2)
    assert cut is not None
    assert cut.num_layers == 1  # where it remembers what is kept


class Checkpointed(nn.Module):
    """Layers 1 to 3 run anew in the backward pass, from the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4, 10)

    def again(self, x: Tensor) -> Tensor:
        for layer in self.middle:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.again, self.first(x), use_reentrant=False).mean(dim=(2, 3)))


def test_no_cut_lies_inside_a_part_that_runs_anew_in_the_backward_pass() -> None:
    torch.manual_seed(0)
    model = Checkpointed()
    for boundary, expected in ((1, 1), (2, 1), (3, 1), (4, 4)):
        cut = cut_of(model, boundary)
        assert cut is not None
        assert cut.num_layers == expected
        model.zero_grad()
        with cut.behind(cut.outputs(images(2))):
            answer = model(images(3))
        answer.square().mean().backward()
        kept = model.head.weight.grad.clone()  # type: ignore[union-attr]
        model.zero_grad()
        model(images(2)).square().mean().backward()
        torch.testing.assert_close(kept, model.head.weight.grad)


class Centred(nn.Module):
    def __init__(self, centre: nn.Module | Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.centre = centre

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.centre(self.first(x))).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "centre",
    [nn.BatchNorm2d(4, affine=False, track_running_stats=False), lambda x: x - x.mean(), lambda x: x / x.std()],
    ids=["batch norm without statistics", "mean", "deviation"],
)
def test_layers_that_look_at_other_images_are_cut_before_they_do(centre: Any) -> None:
    torch.manual_seed(0)
    cut = cut_of(Centred(centre), 2)
    assert cut is not None
    assert cut.num_layers == 1


def test_a_network_that_draws_behind_the_cut_is_cut_and_draws_as_ever() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.drop = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.second(self.first(x))).mean(dim=(2, 3)) * float(1 + np.random.random())

    torch.manual_seed(0)
    model = Noisy()
    layers = trace_layers(model, EXAMPLE)
    states = torch.random.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert find_cut(model, layers, 1, EXAMPLE) is not None
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]


def test_deep_networks_that_drop_blocks_at_random_are_cut_before_the_first_of_them() -> None:
    torch.manual_seed(0)
    model = torchvision.models.efficientnet_b0(num_classes=10)
    learner = LocalizedLearner(model, EXAMPLE, rule="frozen", hold_statistics=True)
    boundary = int(0.5 * len(learner.layers))
    learner.advance(boundary)
    learner.train()
    cut = find_cut(model, learner.layers, boundary, EXAMPLE)
    assert cut is not None
    # The first block with a shortcut, and so one that may be dropped, is features.2.1.
    assert learner.layers[cut.num_layers - 1].name.startswith("features.2.0")
    assert learner.layers[cut.num_layers].name.startswith("features.2.1")


def test_sequences_are_cut_too() -> None:
    torch.manual_seed(0)
    model, example = sequence_network().eval(), torch.zeros(1, 3, 12)
    cut = find_cut(model, trace_layers(model, example), 1, example)
    assert cut is not None
    first, second = torch.randn(4, 3, 12), torch.randn(4, 3, 12)
    expected = model(first)
    with cut.behind(cut.outputs(first)):
        torch.testing.assert_close(model(second), expected)
