"""Optimizer and schedule against torch's own and closed forms."""

import math

import pytest
import torch
from torch import nn

from locsgd_dist.optimization import OptimConfig, RegionOptimizer, averaged_model, lr_at


def test_cosine_agrees_with_torch():
    config = OptimConfig(lr=0.3, schedule="cosine")
    parameter = nn.Parameter(torch.zeros(1))
    oracle = torch.optim.SGD([parameter], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, T_max=10)
    for epoch in range(10):
        assert lr_at(config, epoch, 10) == pytest.approx(oracle.param_groups[0]["lr"], rel=1e-9)
        oracle.step()
        schedule.step()


def test_step_agrees_with_torch():
    config = OptimConfig(lr=0.05, schedule="step", step_epochs=3, step_gamma=0.1)
    oracle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(oracle, step_size=3, gamma=0.1)
    for epoch in range(10):
        assert lr_at(config, epoch, 10) == pytest.approx(oracle.param_groups[0]["lr"], rel=1e-9)
        assert lr_at(config, epoch + 0.99, 10) == lr_at(config, epoch, 10)
        oracle.step()
        schedule.step()


def test_warmup_then_cosine():
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_epochs=2, final_lr_fraction=0.1)
    assert lr_at(config, 0, 10) == 0
    assert lr_at(config, 1, 10) == pytest.approx(0.5)
    assert lr_at(config, 2, 10) == pytest.approx(1.0)
    assert lr_at(config, 6, 10) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert lr_at(config, 10, 10) == pytest.approx(0.1)


def test_linear_and_constant():
    assert lr_at(OptimConfig(lr=2.0, schedule="linear"), 2.5, 10) == pytest.approx(1.5)
    assert lr_at(OptimConfig(lr=2.0, schedule="constant"), 9.9, 10) == 2.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_released_parameters_stay_and_the_rest_goes_on_as_torch_would(name: str):
    model, twin = network(), network()
    optimizer = RegionOptimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.01))
    kwargs = {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.999)}
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    oracle = kind(twin.parameters(), lr=0.1, weight_decay=0.01, **kwargs)
    for step in range(6):
        if step == 3:
            leaving = list(model[0].parameters())
            for parameter in leaving:
                parameter.requires_grad_(False)
            optimizer.release(leaving)
            held = [p.detach().clone() for p in leaving]
            assert not any(p in optimizer.optimizer.state for p in leaving)
        backward(model, step)
        backward(twin, step)
        if step >= 3:
            with torch.no_grad():
                for parameter, value in zip(twin[0].parameters(), held, strict=True):
                    parameter.grad = None
                    parameter.copy_(value)
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
        oracle.zero_grad()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_loads_by_name_after_layers_have_left(name: str):
    model = network()
    config = OptimConfig(name=name, lr=0.1)
    optimizer = RegionOptimizer(model, config)
    backward(model, 0)
    optimizer.step()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    assert set(state) == {n for n, _ in model.named_parameters()}

    again = network()
    again.load_state_dict(weights)
    resumed = RegionOptimizer(again, config)
    for m, o in ((model, optimizer), (again, resumed)):
        for parameter in m[0].parameters():
            parameter.requires_grad_(False)
        o.release(m[0].parameters())
    resumed.load_state_dict(state)
    for m, o in ((model, optimizer), (again, resumed)):
        o.zero_grad()
        backward(m, 1)
        o.step()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_momentum_that_is_carried_on_is_that_of_steps_without_gradient(fused: bool, nesterov: bool):
    """The first layer has a gradient in every third step; of the others one is left out as not finite."""
    config = OptimConfig(lr=0.1, weight_decay=0.01, nesterov=nesterov)
    model, twin = network(), network()
    options = {"keeps_released": True, "carries_released": True, "fused": fused}
    optimizer = RegionOptimizer(model, config, **options)
    groups = [{"params": twin[0].parameters()}, {"params": twin[1:].parameters()}]
    oracle = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    optimizer.release(model[0].parameters())
    for step in range(9):
        backward(model, step)
        backward(twin, step)
        is_refresh = step % 3 == 2
        oracle.param_groups[0]["weight_decay"] = 0.01 if is_refresh else 0.0
        if not is_refresh:
            for ours, theirs in zip(model[0].parameters(), twin[0].parameters(), strict=True):
                ours.grad, theirs.grad = None, torch.zeros_like(theirs)
        is_bad = step in (4, 5, 6)
        optimizer.step(unless=torch.tensor(is_bad))
        # Before its first gradient it rests: torch's momentum begins with that.
        if not is_bad:
            oracle.step()
        optimizer.zero_grad()
        oracle.zero_grad()
        if step == 6:
            saved, again = optimizer.state_dict(), network()
            again.load_state_dict(model.state_dict())
            model, optimizer = again, RegionOptimizer(again, config, **options)
            optimizer.release(model[0].parameters())
            optimizer.load_state_dict(saved)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_norms_and_biases_can_be_spared_weight_decay():
    model = network()
    optimizer = RegionOptimizer(model, OptimConfig(lr=0.1, momentum=0, weight_decay=0.5, decay_norm_and_bias=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_network_without_trainable_parameters_is_refused():
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        RegionOptimizer(model, OptimConfig())


def test_averaged_model_follows_the_closed_form():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = averaged_model(model, 0.9)
    ema.update_parameters(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(0.9 * 1.0 + 0.1 * 3.0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_verdict", [False, True])
def test_half_precision_passes_over_steps_without_gradients_and_bad_ones(fused: bool, with_verdict: bool):
    """Where the whole network is localized only refresh steps have gradients, and only they may move anything."""
    torch.manual_seed(0)
    model, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    ours = RegionOptimizer(model, OptimConfig(lr=0.1), keeps_released=True, fused=fused)
    ours.release(list(model.parameters()))
    oracle = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for is_refresh, is_bad in [(False, False), (True, False), (True, True), (False, False), (True, False)]:
        inputs = torch.randn(4, 3)
        unless = torch.tensor(is_bad) if with_verdict else None
        if is_refresh:
            scalers[0].scale(model(inputs).square().sum()).backward()
            if is_bad and not with_verdict:
                model.bias.grad[0] = torch.nan
        before = [p.detach().clone() for p in model.parameters()]
        ours.step(scalers[0], unless=unless)
        ours.zero_grad()
        if is_refresh and not is_bad:
            scalers[1].scale(plain(inputs).square().sum()).backward()
            scalers[1].step(oracle)
            scalers[1].update()
            oracle.zero_grad()
        else:
            assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected)
            assert parameter.isfinite().all()
