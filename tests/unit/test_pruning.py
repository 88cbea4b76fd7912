"""Pruning during training: the penalty, which channels are dead, and what a cut leaves of network and optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenet_v2
from torchvision.models.resnet import Bottleneck, ResNet

from locsgd_dist.baselines.pruning import Pruning, PruningConfig, group_lasso
from locsgd_dist.baselines.surgery import ChannelGroups, adopt_shapes, shapes_of
from locsgd_dist.data import Batch
from locsgd_dist.distributed import RegionDDP, Runtime
from locsgd_dist.distributed.replicas import Replicas
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.localized.layers import trace_layers
from locsgd_dist.models import ModelConfig, build_model, network_size
from locsgd_dist.optimization import OptimConfig, RegionOptimizer, averaged_model
from locsgd_dist.step import Tally, TrainConfig, TrainStep

CPU = torch.device("cpu")
EXAMPLE = torch.zeros(1, 3, 32, 32)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: build_model(ModelConfig(name="resnet18", width=4), 10),
    "vgg13": lambda: build_model(ModelConfig(name="vgg13", width=4), 10),
    "bottlenecks": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10),
    "mobilenet_v2": lambda: mobilenet_v2(num_classes=10, width_mult=0.25, dropout=0.0),
}


def random_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


def weakest_half(model: nn.Module) -> tuple[ChannelGroups, list[list[int]]]:
    classifier = trace_layers(model, EXAMPLE.to(next(model.parameters())))[-1].name
    groups = ChannelGroups(model, EXAMPLE, keep_outputs=[classifier])
    return groups, [found.argsort()[: len(found) // 2].tolist() for found in groups.magnitudes()]


@torch.no_grad()
def mask(model: nn.Module, positions: dict[str, Tensor]) -> None:
    """Zeroes every parameter of the whole network that the cut one lacks: weights and the norms' affine maps."""
    for name, parameter in model.named_parameters():
        if name in positions:
            kept = torch.zeros(parameter.numel(), dtype=torch.bool)
            kept[positions[name].flatten()] = True
            parameter.mul_(kept.view_as(parameter))


def flops(model: nn.Module) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model(EXAMPLE.to(next(model.parameters())))
    return counter.get_total_flops()


# --- the cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_cut_network_computes_what_the_masked_one_does_with_fewer_operations(name: str, channels_last: bool) -> None:
    model = random_network(name).double()  # so that rounding, which batch norm blows up, hides nothing
    if channels_last:
        model.to(memory_format=torch.channels_last)
    masked = copy.deepcopy(model)
    averaged = averaged_model(model, 0.9)
    parameters = list(model.parameters())
    before = {"flops": flops(model.eval()), "parameters": sum(p.numel() for p in parameters)}

    groups, channels = weakest_half(model)
    surgery = groups.remove(channels)
    surgery.apply(model)
    surgery.apply(averaged.module)
    mask(masked, dict(surgery.positions))

    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for mode in (False, True):  # running statistics, then those of the batch
        expected = masked.train(mode)(images)
        torch.testing.assert_close(model.train(mode)(images), expected, rtol=1e-9, atol=1e-9)
    assert averaged.module.eval()(images).shape == (4, 10)
    assert list(model.parameters()) == parameters, "parameters must stay the same objects"

    size = network_size(model, EXAMPLE.double())
    assert flops(model.eval()) == 2 * size["forward_macs"] < 0.4 * before["flops"]
    assert size["num_parameters"] == sum(p.numel() for p in model.parameters()) < 0.4 * before["parameters"]
    if channels_last:
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_network_adopts_the_shapes_of_a_pruned_one(name: str) -> None:
    pruned = random_network(name)
    groups, channels = weakest_half(pruned)
    groups.remove(channels).apply(pruned)
    plain = NETWORKS[name]()
    adopt_shapes(plain, shapes_of(pruned))
    plain.load_state_dict(pruned.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(images), pruned.eval()(images), rtol=0, atol=0)
    assert repr(plain) == repr(pruned)  # channel counts that modules keep for themselves


def test_momentum_follows_and_training_goes_on_as_in_the_masked_network() -> None:
    model = random_network("resnet18").train()
    optimizer = RegionOptimizer(model, OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-2))
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    optimizer.zero_grad()

    masked = copy.deepcopy(model)
    plain = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for twin, parameter in zip(masked.parameters(), model.parameters(), strict=True):
        plain.state[twin]["momentum_buffer"] = optimizer.optimizer.state[parameter]["momentum_buffer"].clone()

    groups, channels = weakest_half(model)
    surgery = groups.remove(channels)
    surgery.apply(model)
    optimizer.cut(surgery.cut)
    mask(masked, dict(surgery.positions))
    for network, step in ((model, optimizer.step), (masked, plain.step)):
        F.cross_entropy(network(images), targets).backward()
        step()
    left = dict(masked.named_parameters())
    for name, parameter in model.named_parameters():
        expected = surgery.cut(name, left[name].detach())
        torch.testing.assert_close(parameter.detach(), expected, rtol=2e-3, atol=2e-4)


# --- which channels are dead --------------------------------------------------------------------------------------


def stage_of(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """By name: every convolution that writes (dimension 0) or reads (dimension 1) the first stage's channels."""
    return {
        "stem": (model.conv1, 0),
        "branch of the first block": (model.layer1[0].conv2, 0),
        "branch of the second block": (model.layer1[1].conv2, 0),
        "first block": (model.layer1[0].conv1, 1),
        "second block": (model.layer1[1].conv1, 1),
        "next stage": (model.layer2[0].conv1, 1),
        "next stage's shortcut": (model.layer2[0].downsample[0], 1),
    }


@pytest.mark.parametrize("alive", [None, *stage_of(NETWORKS["resnet18"]())])
@torch.no_grad()
def test_a_channel_that_shortcuts_share_dies_when_all_its_layers_let_it(alive: str | None, runtime: Runtime) -> None:
    model = random_network("resnet18")
    for name, (layer, dim) in stage_of(model).items():
        layer.weight.select(dim, 2).fill_(9e-4 if name != alive else 1.1e-3)
    pruning = make_pruning(model, runtime, threshold=1e-3)
    kept = [0, 1, 3]
    before = model.layer1[0].conv1.weight[:, kept].clone()
    surgery = pruning.end_epoch(0)
    if alive is not None:
        assert surgery is None
        return
    assert surgery.removed_channels == 1
    assert torch.equal(model.layer1[0].conv1.weight, before)
    assert model.bn1.num_features == model.layer1[1].bn2.num_features == 3
    assert model.layer1[0].bn1.num_features == 4


@torch.no_grad()
def test_magnitudes_are_the_largest_weight_that_writes_or_reads_a_channel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 6)
    )
    (first, second) = sorted(ChannelGroups(model, torch.zeros(1, 3, 7, 7), ["5"]).magnitudes(), key=len)[::-1]
    a, b, c = model[0].weight, model[3].weight, model[5].weight.view(6, 4, 9)
    assert first.tolist() == [max(a[i].abs().max(), b[:, i].abs().max()).item() for i in range(5)]
    assert second.tolist() == [max(b[i].abs().max(), c[:, i].abs().max()).item() for i in range(4)]


@torch.no_grad()
def test_the_largest_of_too_few_channels_stay(runtime: Runtime) -> None:
    model = random_network("vgg13")
    for parameter in model.parameters():
        parameter.mul_(1e-6)
    model.features[0].weight[[1, 3]] *= 2
    pruning = make_pruning(model, runtime, min_channels=2)
    expected = model.features[0].weight[[1, 3]].clone()
    pruning.end_epoch(0)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {conv.out_channels for conv in convolutions} == {2}
    assert torch.equal(convolutions[0].weight, expected)
    assert model.classifier.weight.shape == (10, 2)


def test_channels_are_removed_every_few_epochs_only(runtime: Runtime) -> None:
    model = random_network("vgg13")
    pruning = make_pruning(model, runtime, threshold=1e6, every_epochs=3, min_channels=2)
    assert [pruning.end_epoch(epoch) is not None for epoch in range(4)] == [False, False, True, False]


# --- the penalty --------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(CPU)


def make_pruning(model: nn.Module, runtime: Runtime, **keys: object) -> Pruning:
    config = PruningConfig(**{"every_epochs": 1} | keys)
    return Pruning(config, trace_layers(model, EXAMPLE), [model], EXAMPLE, runtime)


def brute_force_lasso(model: nn.Module) -> float:
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    total = 0.0
    for position, layer in enumerate(layers):
        weight = layer.weight.detach().double()
        if position < len(layers) - 1:
            total += sum(weight[i].square().sum().sqrt().item() for i in range(weight.shape[0]))
        if position > 0 and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            total += sum(weight[:, i].square().sum().sqrt().item() for i in range(weight.shape[1]))
    return total


@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v2"])
def test_the_lasso_sums_norms_of_channels(name: str) -> None:
    model = random_network(name)
    layers = trace_layers(model, EXAMPLE)
    assert group_lasso(layers).item() == pytest.approx(brute_force_lasso(model), rel=1e-5)


def test_a_channel_at_zero_has_a_finite_gradient() -> None:
    model = random_network("vgg13")
    with torch.no_grad():
        model.features[3].weight[1] = 0
    group_lasso(trace_layers(model, EXAMPLE)).backward()
    gradient = model.features[3].weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient[0].abs().min() > 0


def test_the_ratio_sets_the_coefficient_from_the_first_loss(runtime: Runtime) -> None:
    model = random_network("vgg13")
    pruning = make_pruning(model, runtime, lasso_ratio=0.25)
    tally = Tally(CPU)
    assert pruning.penalty() is None
    with pruning.step(0, tally):
        tally.add(torch.tensor(4 * 2.5), torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64))
    penalty = pruning.penalty().item()
    assert penalty / (2.5 + penalty) == pytest.approx(0.25)
    with pruning.step(4, tally):
        tally.add(torch.tensor(100.0), torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64))
    assert pruning.penalty().item() == penalty


def test_a_step_descends_the_loss_with_the_penalty() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    reference = copy.deepcopy(model)
    example = torch.zeros(1, 3, 8, 8)
    learner = LocalizedLearner(model, example, rule="frozen")
    step = TrainStep(
        TrainConfig(device="cpu"),
        RegionDDP(model, None),
        Replicas(learner),
        RegionOptimizer(model, OptimConfig(lr=0.1, momentum=0.0, weight_decay=0.0)),
        world_size=1,
        device=CPU,
        penalty=lambda: 0.3 * group_lasso(learner.layers),
    )
    images, targets = torch.randn(7, 3, 8, 8), torch.arange(7) % 5
    # Two micro-batches of unequal size: the penalty counts once.
    step([Batch(images[:4], targets[:4], 4, 4), Batch(images[4:], targets[4:], 3, 3)], Tally(CPU))

    loss = F.cross_entropy(reference(images), targets)
    lasso = [channel.norm() for channel in (*reference[0].weight, *reference[4].weight.T)]
    (loss + 0.3 * sum(lasso)).backward()
    for found, parameter in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), (parameter - 0.1 * parameter.grad).detach(), rtol=1e-4, atol=1e-6)


# --- what cannot be pruned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 2, 1)), "0 is a grouped convolution"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)), "1 is a GroupNorm"),
    ],
)
def test_what_cannot_be_cut_is_named_in_one_line(network: nn.Module, named: str, runtime: Runtime) -> None:
    layers = trace_layers(network, torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=rf"^pruning\.every_epochs > 0 needs a network of .*; {named}$"):
        Pruning(PruningConfig(every_epochs=1), layers, [network], EXAMPLE, runtime)
