"""An epoch's last step may leave a rank one sample, of which a batch norm behind a pooling layer sees one value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_reference import CLASSES, Weights, assert_bit_equal, assert_close, gradients_of, samples, weights_of
from test_train_step import Training
from torch import nn

from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.step import single_values_passing


class PooledNet(nn.Sequential):
    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(
                *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                *(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)),
            )


def test_the_norm_that_sees_one_value_takes_its_running_statistics() -> None:
    training = Training("all_reduce", model=PooledNet())
    plain = PooledNet().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for seed, size in enumerate((8, 1, 8)):
        images, targets = samples(size, seed)
        training.step((images, targets))
        plain[6].train(size > 1)  # the first norm sees 36 values of a single image
        optimizer.zero_grad()
        F.cross_entropy(plain(images), targets).backward()
        optimizer.step()
        assert_close(weights_of(training.model), weights_of(plain), rtol=1e-5, atol=1e-7)
        assert all(module.training for module in training.model.modules())


def train_to_the_last_pair(boundary: int) -> tuple[Weights, Weights]:
    training = Training("all_reduce", model=PooledNet())
    training.shift(boundary)
    training.step(samples(8, 0))
    before = weights_of(training.model)
    training.step(samples(2, 1))
    return before, weights_of(training.model)


@pytest.mark.parametrize("boundary", [0, 2])
def test_two_ranks_with_one_sample_each(boundary: int, two_ranks: Any) -> None:
    ranks = two_ranks.run(train_to_the_last_pair, boundary)
    parameters = [name for name, _ in PooledNet().named_parameters()]
    assert_bit_equal([{name: after[name] for name in parameters} for _, after in ranks])
    for before, after in ranks:
        assert not (before["8.weight"] == after["8.weight"]).all()
        assert (before["6.running_mean"] == after["6.running_mean"]).all()
        assert not (before["1.running_mean"] == after["1.running_mean"]).all()


def test_recomputation_meets_the_same_statistics() -> None:
    images, targets = samples(1, 0)
    gradients = []
    for recompute in (False, True):
        model = PooledNet().train()
        learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), rule="frozen")
        learner.advance(2)
        with single_values_passing(model), learner.refreshing(recompute=recompute):
            F.cross_entropy(model(images), targets).backward()
        gradients.append(gradients_of(model))
    assert gradients[0].keys() == gradients[1].keys() >= {"0.weight", "5.weight"}
    assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)
