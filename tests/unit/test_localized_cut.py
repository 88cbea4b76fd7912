"""A network taken apart behind its resting layers, held against the network whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision.models
from localized_networks import sequence_network, timm_swin, timm_vision_transformer, vision_transformer
from torch import Tensor, nn

from locsgd_dist.localized import LocalizedLearner, find_cut, is_repeatable
from locsgd_dist.localized.layers import trace_layers
from locsgd_dist.models import resnet18, vgg13

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(10, width=8),
    "vgg13": lambda: vgg13(10, width=8),
    "torchvision resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "torchvision densenet121": lambda: torchvision.models.densenet121(num_classes=10),
    "torchvision vision transformer": vision_transformer,
    "timm vision transformer": timm_vision_transformer,
    "timm swin": timm_swin,
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
        assert outputs.shape == (4, *cut.shape)
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


class Ways(nn.Module):
    """One activation, shared by all of a network, and a way around the first convolution."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.first, self.second, self.third = (CountedConvolution(3, 3, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU()
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.second(self.relu(self.first(x))))
        z = self.relu(self.third(y))
        if self.way == "images to the end":
            z = z + x
        elif self.way == "brightness to the end":
            z = z * x.mean()
        return self.head(z.mean(dim=(2, 3)))


def test_layers_before_the_cut_do_not_run_behind_it_and_a_shared_activation_does() -> None:
    torch.manual_seed(0)
    model = Ways("straight")
    layers = trace_layers(model, EXAMPLE)
    cut = find_cut(model, layers, 2, EXAMPLE)
    assert cut is not None
    assert cut.num_layers == 2
    outputs, expected = cut.outputs(images(2)), model(images(2))
    before = model.first.runs, model.second.runs, model.third.runs
    with cut.behind(outputs):
        torch.testing.assert_close(model(images(3)), expected)
    assert (model.first.runs, model.second.runs, model.third.runs) == (before[0], before[1], before[2] + 1)


@pytest.mark.parametrize("way", ["images to the end", "brightness to the end"])
@pytest.mark.parametrize("zero_head", [False, True])
def test_a_network_with_a_way_around_is_not_cut(way: str, zero_head: bool) -> None:
    torch.manual_seed(0)
    model = Ways(way)
    if zero_head:  # as a new classifier may be: what the network gives then tells nothing
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    assert find_cut(model, trace_layers(model, EXAMPLE), 2, EXAMPLE) is None


def test_no_layer_no_cut_and_something_is_left_behind_it() -> None:
    model = resnet18(10, width=8)
    layers = trace_layers(model, EXAMPLE)
    assert find_cut(model, layers, 0, EXAMPLE) is None
    cut = find_cut(model, layers, len(layers), EXAMPLE)
    assert cut is not None
    assert cut.num_layers < len(layers)


def test_to_look_for_a_cut_changes_nothing() -> None:
    model = resnet18(10, width=8).train()
    layers = trace_layers(model, EXAMPLE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    cut = find_cut(model, layers, 9, EXAMPLE)
    assert cut is not None
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("hold", [False, True])
def test_outputs_repeat_where_statistics_are_held(hold: bool) -> None:
    torch.manual_seed(0)
    model = resnet18(10, width=8)
    learner = LocalizedLearner(model, EXAMPLE, rule="frozen", hold_statistics=hold)
    learner.advance(9)
    learner.train()
    cut = find_cut(model, learner.layers, 9, EXAMPLE)
    assert cut is not None
    statistics = [buffer.clone() for buffer in model.buffers()]
    assert is_repeatable(cut, EXAMPLE) == hold
    if hold:
        assert all(map(torch.equal, model.buffers(), statistics))


def test_dropout_does_not_repeat() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(10))
    model(EXAMPLE)
    layers = trace_layers(model, EXAMPLE)
    cut = find_cut(model.train(), layers, 1, EXAMPLE)
    assert cut is not None
    assert not is_repeatable(cut, EXAMPLE)
    model.eval()
    assert is_repeatable(cut, EXAMPLE)


def test_sequences_are_cut_too() -> None:
    torch.manual_seed(0)
    model, example = sequence_network().eval(), torch.zeros(1, 3, 12)
    cut = find_cut(model, trace_layers(model, example), 1, example)
    assert cut is not None
    first, second = torch.randn(5, 3, 12), torch.randn(5, 3, 12)
    with cut.behind(cut.outputs(first)):
        torch.testing.assert_close(model(second), model.__class__.forward(model, second))
