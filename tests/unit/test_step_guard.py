"""Steps whose loss or gradient is not finite: nothing moves, they are counted, too many stop the run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from locsgd_dist.faults import FaultConfig, StepGuard, TooManyBadStepsError
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.optimization import OptimConfig, RegionOptimizer

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def bad(value: bool) -> torch.Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_makes_a_step_bad(value: float):
    model, guard = network(), StepGuard(CPU)
    guard.begin(model)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert not guard.judge(model.parameters())
    model[0].weight.grad[0, 0, 0, 0] = value
    assert guard.judge(model.parameters())


def test_an_infinite_loss_with_finite_gradients_spreads_to_every_gradient():
    weight = nn.Parameter(torch.tensor([3e38, 1.0]))
    guard = StepGuard(CPU)
    loss = (weight * torch.tensor([2.0, 1.0])).sum()  # overflows; its gradients are 2 and 1
    assert loss.isinf()
    guard.watch(loss).backward()
    assert weight.grad.isnan().all()
    assert guard.judge([weight])


def test_a_finite_loss_keeps_its_gradients_to_the_bit():
    weight = nn.Parameter(torch.randn(50))
    (weight.sin().sum() * 0.3).backward()
    expected, weight.grad = weight.grad, None
    StepGuard(CPU).watch(weight.sin().sum() * 0.3).backward()
    assert torch.equal(weight.grad, expected)


def test_without_any_gradient_the_loss_decides():
    model, guard = network().requires_grad_(False), StepGuard(CPU)
    for factor, expected in ((1.0, False), (torch.nan, True), (1.0, False)):
        guard.begin(model)
        guard.watch(model(torch.randn(2, 3, 8, 8)).sum() * factor)
        assert bool(guard.judge(model.parameters())) is expected


@pytest.mark.parametrize("bad_part", [None, 0, 1])
def test_where_a_part_refreshes_the_whole_network_the_loss_of_the_rest_counts_too(bad_part: int | None):
    model, guard = network(), StepGuard(CPU)
    guard.begin(model)
    for part in (0, 1):
        model.requires_grad_(part == 0)
        loss = guard.watch(model(torch.randn(2, 3, 8, 8)).sum() * (torch.nan if part == bad_part else 1.0))
        if part == 0:
            loss.backward()
    assert bool(guard.judge(model.parameters())) is (bad_part is not None)


@pytest.mark.parametrize("is_bad", [True, False])
def test_running_statistics_of_a_bad_step_are_given_back(is_bad: bool):
    model, guard = network(), StepGuard(CPU)
    before = copy.deepcopy(dict(model[1].named_buffers()))
    guard.begin(model)
    model(torch.full((2, 3, 8, 8), torch.nan if is_bad else 3.0))
    guard.end(bad(is_bad))
    for name, buffer in model[1].named_buffers():
        assert torch.equal(buffer, before[name]) is is_bad


def test_bad_steps_are_counted_and_too_many_in_a_row_stop_the_run():
    guard = StepGuard(CPU, max_bad_steps=3)
    guard.begin_epoch()
    reported = []
    for is_bad in (True, True, False, True, True):
        guard.end(bad(is_bad))
        reported.append(guard.check())
    assert reported == [0, 1, 1, 0, 1]  # one step late
    assert guard.finish_epoch() == 1
    assert guard.num_skipped == 4
    guard.begin_epoch()
    assert guard.num_skipped == 0
    guard.end(bad(True))  # the third in a row, across the epochs' edge
    with pytest.raises(TooManyBadStepsError, match=r"3 steps in a row .*faults\.max_bad_steps"):
        guard.finish_epoch()


def test_counts_survive_a_resume():
    guard, other = StepGuard(CPU, max_bad_steps=3), StepGuard(CPU, max_bad_steps=3)
    for _ in range(2):
        guard.end(bad(True))
    other.load_state_dict(guard.state_dict())
    assert (other.num_skipped, other.finish_epoch()) == (2, 0)
    other.end(bad(True))
    with pytest.raises(TooManyBadStepsError):
        other.finish_epoch()


def test_a_bad_number_of_steps_is_refused_by_name():
    with pytest.raises(ValueError, match=r"faults\.max_bad_steps must be >= 1"):
        FaultConfig(max_bad_steps=0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_leaves_out_bad_steps_and_only_those(name: str, fused: bool):
    """The fused kernels, which decide on the device, run on the CPU too: the same code that CUDA takes."""
    torch.manual_seed(1)
    gradients = torch.randn(5, 4, 3)
    is_bad = [True, False, False, True, False]
    gradients[3, 0, 0] = torch.nan
    model = nn.Linear(3, 4, bias=False)
    weight = model.weight.detach().clone().requires_grad_()
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.01)
    optimizer = RegionOptimizer(model, config, fused=fused)
    plain = (
        torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
        if name == "sgd"
        else torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
    )
    for gradient, left_out in zip(gradients, is_bad, strict=True):
        model.weight.grad = gradient.clone()
        optimizer.step(unless=bad(left_out))
        if not left_out:
            weight.grad = gradient.clone()
            plain.step()
        torch.testing.assert_close(model.weight, weight)
    restored = RegionOptimizer(model, config, fused=fused)
    restored.load_state_dict(optimizer.state_dict())
    for o in (optimizer, restored):
        assert all(v.isfinite().all() for v in o.optimizer.state[model.weight].values() if torch.is_tensor(v))


def test_localized_updates_that_are_not_finite_move_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    learner = LocalizedLearner(model, torch.zeros(1, 3), lr=0.5)
    learner.advance(2)
    weights = [model[i].weight.detach().clone() for i in range(2)]
    model(torch.ones(2, 3))
    learner.deltas[0][1, 1] = torch.inf
    learner.apply()
    assert torch.equal(model[0].weight, weights[0])
    assert (model[1].weight - weights[1]).norm().item() == pytest.approx(0.5)

    weights = [model[i].weight.detach().clone() for i in range(2)]
    model(torch.ones(2, 3))
    learner.apply(unless=bad(True))
    assert all(torch.equal(model[i].weight, weights[i]) for i in range(2))
    assert not learner.deltas
