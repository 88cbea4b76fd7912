"""Stochastic depth: what a dropped block computes, how often it is dropped, what evaluation expects of it."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from locsgd_dist.baselines.stochastic_depth import (
    StochasticDepth,
    StochasticDepthConfig,
    droppable_blocks,
    fold_survival,
    with_droppable_blocks,
)
from locsgd_dist.localized.layers import trace_layers
from locsgd_dist.models import ModelConfig, build_model


def cifar_resnet() -> nn.Module:
    return build_model(ModelConfig(name="resnet18", width=4), 10)


def bottleneck_resnet() -> nn.Module:
    return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10)


def mobilenet() -> nn.Module:
    return mobilenet_v2(num_classes=10, width_mult=0.25, dropout=0.0)


NETWORKS = [cifar_resnet, bottleneck_resnet, mobilenet]


def random_norms(model: nn.Module) -> nn.Module:
    """Statistics and affine maps that are not those of birth, under which a scale or a sign could go unnoticed."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


class ShortcutOnly(nn.Module):
    """What a residual block is without its branch, written down anew."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.downsample = getattr(block, "downsample", None)
        self.rectify = isinstance(block, (BasicBlock, Bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.downsample is None else self.downsample(x)
        return x.clamp(min=0) if self.rectify else x


def residual_names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (BasicBlock, Bottleneck))
        or (isinstance(module, InvertedResidual) and module.use_res_connect)
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_without_some_blocks_equals_the_network_without_their_branches(network) -> None:
    torch.manual_seed(0)
    model = random_norms(network())
    reference = copy.deepcopy(model)
    names = residual_names(model)
    with_droppable_blocks(model, StochasticDepthConfig(0.5))
    dropped = names[::2]
    for name in dropped:
        model.get_submodule(name).dropped = True
        reference.set_submodule(name, ShortcutOnly(reference.get_submodule(name)))
    images = torch.randn(3, 3, 32, 32)
    for mode in (True, False):
        if not mode:  # survivors in training mode are as they were; in evaluation mode they are scaled
            for block in droppable_blocks(model):
                block.survival = 1.0
        out, expected = model.train(mode)(images), reference.train(mode)(images)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)

    model.train()(images).square().sum().backward()
    reference.train()(images).square().sum().backward()
    expected_gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if name in expected_gradients:
            torch.testing.assert_close(parameter.grad, expected_gradients[name].grad, rtol=0, atol=0)
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_of_a_dropped_branch_runs(network) -> None:
    model = with_droppable_blocks(network(), StochasticDepthConfig(0.5))
    blocks = droppable_blocks(model)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    for block in blocks[1:]:
        block.dropped = True
    model(torch.randn(2, 3, 32, 32))
    names = {block: name for name, block in model.named_modules()}
    for block in blocks[1:]:
        inside = [n.removeprefix(f"{names[block]}.") for n in ran if n.startswith(f"{names[block]}.")]
        assert all(n.startswith("downsample") for n in inside), inside
    assert any(n.startswith(f"{names[blocks[0]]}.") for n in ran)


def linear_block(survival: float) -> nn.Module:
    block = InvertedResidual(4, 4, stride=1, expand_ratio=1)
    block.conv = nn.Sequential(nn.Conv2d(4, 4, 1))
    return block


def test_evaluation_gives_the_expected_output_over_all_patterns() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*[linear_block(1.0) for _ in range(3)]).double()
    branches = [copy.deepcopy(block.conv) for block in model]
    with_droppable_blocks(model, StochasticDepthConfig(0.4))
    survival = [0.8, 0.6, 0.4]
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for pattern in itertools.product([True, False], repeat=3):
        probability = math.prod(p if runs else 1 - p for p, runs in zip(survival, pattern, strict=True))
        y = x
        for branch, runs in zip(branches, pattern, strict=True):
            y = y + branch(y) if runs else y
        expected += probability * y
    torch.testing.assert_close(model.eval()(x), expected)


def test_survival_falls_linearly_and_blocks_are_dropped_at_their_rate_independently() -> None:
    blocks = droppable_blocks(with_droppable_blocks(cifar_resnet(), StochasticDepthConfig(0.5)))
    expected = [1 - l / 8 * 0.5 for l in range(1, 9)]  # eq. 4 of the paper  # noqa: E741
    assert [block.survival for block in blocks] == pytest.approx(expected)

    depth = StochasticDepth(blocks, seed=3)
    steps = 4000
    runs = ~torch.tensor([depth.draw(64 * step) for step in range(steps)])
    for rate, p in zip(runs.double().mean(dim=0).tolist(), expected, strict=True):
        assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / steps)
    # Two blocks, and one block in two steps that follow each other, know nothing of each other.
    for a, b, p in [
        (runs[:, 6], runs[:, 7], expected[6] * expected[7]),
        (runs[1:, 7], runs[:-1, 7], expected[7] ** 2),
    ]:
        assert abs((a & b).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / steps)


def test_draws_follow_from_seed_and_samples_alone() -> None:
    blocks = droppable_blocks(with_droppable_blocks(cifar_resnet(), StochasticDepthConfig(0.5)))
    draws = {seed: [StochasticDepth(blocks, seed).draw(8 * step) for step in range(50)] for seed in (0, 1)}
    torch.rand(7)
    later = StochasticDepth(blocks, 0)
    assert [later.draw(8 * step) for step in reversed(range(50))] == draws[0][::-1]
    assert draws[0] != draws[1]


def test_a_step_marks_what_it_skips_and_leaves_nothing_behind() -> None:
    model = with_droppable_blocks(cifar_resnet(), StochasticDepthConfig(0.1))
    depth = StochasticDepth(droppable_blocks(model), seed=0)
    step = next(step for step in range(20) if any(depth.draw(step)) and not all(depth.draw(step)))

    def run_out_of_memory() -> None:
        with depth.step(step):
            model(torch.randn(2, 3, 16, 16)).sum().backward()
            without_gradient = {p for p in model.parameters() if p.grad is None}
            assert without_gradient == depth.skipped
            assert without_gradient
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_out_of_memory()
    assert not depth.skipped
    assert not any(block.dropped for block in droppable_blocks(model))


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_keys_and_owners_are_those_of_the_plain_network(network) -> None:
    plain = network()
    model = with_droppable_blocks(copy.deepcopy(plain), StochasticDepthConfig(0.5))
    example = torch.zeros(1, 3, 32, 32)
    assert list(model.state_dict()) == list(plain.state_dict())
    layers, expected = trace_layers(model, example), trace_layers(plain, example)
    assert layers.block_size == expected.block_size
    assert [(layer.name, [n for n, _ in layer.parameters], layer.macs) for layer in layers] == [
        (layer.name, [n for n, _ in layer.parameters], layer.macs) for layer in expected
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_folding_gives_a_plain_network_that_computes_the_same(network) -> None:
    torch.manual_seed(2)
    plain = random_norms(network())
    model = with_droppable_blocks(copy.deepcopy(plain), StochasticDepthConfig(0.3)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    fold_survival(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert not torch.allclose(plain.eval()(images), expected, rtol=1e-2)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_network_is_not_dropped_with_it() -> None:
    model = with_droppable_blocks(cifar_resnet(), StochasticDepthConfig(0.5))
    averaged = copy.deepcopy(model)
    for block in droppable_blocks(model):
        block.dropped = True
    assert [block.dropped for block in droppable_blocks(averaged)] == [False] * 8
    assert [block.survival for block in droppable_blocks(averaged)] == [b.survival for b in droppable_blocks(model)]


def test_a_survival_of_one_changes_nothing() -> None:
    assert not droppable_blocks(with_droppable_blocks(resnet18(num_classes=2), StochasticDepthConfig()))


def test_a_network_without_residual_blocks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^stochastic_depth\.survival < 1 needs residual blocks .* CifarVGG has none$"
    ):
        with_droppable_blocks(build_model(ModelConfig(name="vgg13", width=4), 10), StochasticDepthConfig(0.5))
