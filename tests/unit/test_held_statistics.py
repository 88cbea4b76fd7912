"""Both readings of batch norm in a localized region: statistics that go on moving, and statistics that are held."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from locsgd_dist.data import Batch
from locsgd_dist.distributed import RegionDDP
from locsgd_dist.distributed.replicas import Replicas
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.localized.layers import trace_layers
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.step import Tally, TrainConfig, TrainStep
from locsgd_dist.validation import evaluate

CPU = torch.device("cpu")
EXAMPLE = torch.zeros(1, 3, 8, 8)


class Net(nn.Sequential):
    """Three convolutions with batch norm, the second without an affine map, and a classifier."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.BatchNorm2d(6, affine=False),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 4),
        )


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    images = torch.randn(3, 6, 3, 8, 8, generator=generator) * 2 + 1
    return [(x, torch.randint(0, 4, (6,), generator=generator)) for x in images]


class OneBatch(list[Batch]):
    num_rounds = 1


def train_plainly(model: nn.Module, reading: Literal["moving", "held"]) -> None:
    """Freezing written out in plain torch: an epoch of SGD, then two with the first two layers frozen."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        model.train()
        if epoch > 0:
            for index in (0, 1, 3, 4):
                model[index].requires_grad_(False)
            if reading == "held":
                model[1].eval()
                model[4].eval()
        for images, targets in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()


@pytest.mark.parametrize("reading", ["moving", "held"])
def test_freezing_equals_plain_torch_under_both_readings(reading: Literal["moving", "held"]) -> None:
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    learner = LocalizedLearner(model, EXAMPLE, rule="frozen", hold_statistics=reading == "held")
    optimizer = RegionOptimizer(model, OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.0))
    config = TrainConfig(device="cpu")
    step = TrainStep(config, RegionDDP(model, None), Replicas(learner), optimizer, world_size=1, device=CPU)
    at_shift: dict[str, Tensor] = {}
    for epoch in range(3):
        if epoch == 1:
            optimizer.release(learner.advance(2))
            at_shift = copy.deepcopy(model.state_dict())
            # A larger batch is tried at epoch edges, and every epoch ends with an evaluation.
            step.trial(12, (3, 8, 8), 4)
        learner.train()
        for images, targets in batches(epoch):
            step([Batch(images, targets, 6, 6)], Tally(CPU))
        evaluate(model, OneBatch([Batch(*batches(9)[0], 6, 6)]), config, CPU)

    train_plainly(reference, reading)
    expected = reference.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    statistics = [name for name in at_shift if name.startswith(("1.", "4.")) and "weight" not in name]
    unchanged = [torch.equal(model.state_dict()[name], at_shift[name]) for name in statistics if "bias" not in name]
    assert unchanged == [reading == "held"] * 6


def test_the_localized_region_still_learns_where_statistics_are_held() -> None:
    model = Net()
    learner = LocalizedLearner(model, EXAMPLE, rule="hebbian", hold_statistics=True)
    learner.advance(2)
    learner.train()
    before = copy.deepcopy(model.state_dict())
    model(batches(0)[0][0])
    learner.apply()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "3.weight", "7.running_mean", "7.running_var", "7.num_batches_tracked"}


def test_norms_belong_to_the_layer_before_them() -> None:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)
    names = {module: name for name, module in model.named_modules()}
    found = {
        layer.name: [names[norm] for norm in layer.norms] for layer in trace_layers(model, torch.zeros(1, 3, 32, 32))
    }
    assert found["conv1"] == ["bn1"]
    assert found["layer2.0.conv2"] == ["layer2.0.bn2"]
    assert found["layer2.0.downsample.0"] == ["layer2.0.downsample.1"]
    assert found["fc"] == []
    assert sum(len(norms) for norms in found.values()) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_norm_before_every_layer_belongs_to_the_first() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 64, 2))
    first, last = trace_layers(model, EXAMPLE)
    assert first.norms == (model[0],)
    assert last.norms == ()
