"""Layer-wise annealing: rates against torch's own and closed forms, steps against torch's optimizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from locsgd_dist.annealing import annealed_lr, hand_over_epochs
from locsgd_dist.config import ConfigError, check_config, parse_config
from locsgd_dist.localized import trace_layers
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.reporting.comparison.traits import strategy_of

ANNEALED = ["--selection.anneal=true", "--selection.kind=linear"]


def network() -> nn.Sequential:
    """No bias before the norm: its gradient is rounding alone, which AdamW would blow up."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_a_layers_cosine_agrees_with_torchs(schedule: Any) -> None:
    config = OptimConfig(lr=0.3, schedule=schedule, step_epochs=1)
    oracle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, T_max=7)
    for epoch in range(8):
        expected = oracle.param_groups[0]["lr"]
        assert annealed_lr(config, epoch, 20, 7) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert annealed_lr(config, epoch, 20, 7, "equal_area") == pytest.approx(expected * 20 / 7, rel=1e-9, abs=1e-12)
        oracle.step()
        torchs.step()


def test_a_rate_is_zero_from_the_hand_over_on() -> None:
    assert [annealed_lr(OptimConfig(), epoch, 20, 7) for epoch in (7, 7.5, 20)] == [0.0, 0.0, 0.0]
    assert annealed_lr(OptimConfig(), 0, 20, 0, "equal_area") == 0.0


@pytest.mark.parametrize("hand_over", [1, 3, 10, 20])
def test_scaled_rates_have_the_same_sum(hand_over: int) -> None:
    """That of half a cosine from .1 over 20 epochs: .1 * 20 / 2."""
    steps = 2000
    rates = [
        annealed_lr(OptimConfig(lr=0.1), (step + 0.5) / steps * 20, 20, hand_over, "equal_area")
        for step in range(steps)
    ]
    assert sum(rates) * 20 / steps == pytest.approx(1.0, rel=1e-3)


def test_warm_up_holds_for_annealed_layers() -> None:
    warm = OptimConfig(lr=1.0, warmup_epochs=4)
    assert annealed_lr(warm, 0, 20, 8) == 0
    assert annealed_lr(warm, 2, 20, 8) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert annealed_lr(warm, 6, 20, 8) == annealed_lr(OptimConfig(lr=1.0), 6, 20, 8)


def test_each_parameter_is_handed_over_with_its_layer() -> None:
    model = network()
    layers = trace_layers(model, torch.zeros(2, 4))
    # 8 epochs, boundary 2 of 3 layers reached at the end: 2 * e / 7 is 1 from epoch 4 on.
    flags = [*ANNEALED, "--selection.tshift=1", "--train.epochs=8"]
    found = hand_over_epochs(parse_config(flags), layers)
    assert {name: found.get(p) for name, p in model.named_parameters()} == {
        "0.weight": 4,
        "1.weight": 4,
        "1.bias": 4,
        "3.weight": 7,
        "3.bias": 7,
        "5.weight": None,
        "5.bias": None,
    }
    for off in ("--localized.rule=none", "--selection.anneal=false"):
        assert hand_over_epochs(parse_config([*flags, off]), layers) == {}


def test_a_trace_longer_than_the_run_hands_over_what_it_reaches(tmp_path: Any) -> None:
    (tmp_path / "trace.json").write_text("[0, 1, 1, 2]")
    flags = ["--selection.anneal=true", "--selection.kind=replay", f"--selection.trace={tmp_path / 'trace.json'}"]
    layers = trace_layers(network(), torch.zeros(2, 4))
    assert set(hand_over_epochs(parse_config([*flags, "--train.epochs=3"]), layers).values()) == {1}


OPTIMIZERS = {
    "sgd": (OptimConfig(weight_decay=0.01, decay_norm_and_bias=False), torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        OptimConfig(nesterov=True, weight_decay=0.01),
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
    ),
    "adamw": (OptimConfig(name="adamw", weight_decay=0.01), torch.optim.AdamW, {"betas": (0.9, 0.999)}),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_torchs_with_a_rate_for_each_parameter(name: str, fused: bool) -> None:
    """Rates change in each step, one layer leaves in the middle, and state goes through a checkpoint."""
    config, kind, options = OPTIMIZERS[name]
    model, twin = network(), network()
    hand_overs = dict.fromkeys(model[:2].parameters(), 3) | dict.fromkeys(model[3].parameters(), 5)
    optimizer = RegionOptimizer(model, config, hand_overs=hand_overs, fused=fused)
    spared = (lambda p: p.dim() <= 1) if not config.decay_norm_and_bias else (lambda p: False)
    oracle = kind(
        [
            {"params": [p], "weight_decay": 0.0 if spared(p) else 0.01, "epoch": hand_overs.get(ours)}
            for ours, p in zip(model.parameters(), twin.parameters(), strict=True)
        ],
        lr=0.1,
        **options,
    )
    for step in range(5):
        rates = {3: 0.3 / (step + 1), 5: 0.02 * step, None: 0.1 / (step + 1)}
        if step == 3:
            leaving = list(model[:2].parameters())
            optimizer.release(leaving)
            for parameter in leaving:
                parameter.requires_grad_(False)
            restored = RegionOptimizer(model, config, hand_overs=hand_overs, fused=fused)
            restored.load_state_dict(optimizer.state_dict())
            optimizer = restored
            for parameter in twin[:2].parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        optimizer.lr = rates[None]
        optimizer.anneal(rates.__getitem__)
        assert optimizer.lr == rates[None]
        for group in oracle.param_groups:
            group["lr"] = rates[group["epoch"]]
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for net, one in ((model, optimizer), (twin, oracle)):
            one.zero_grad()
            net(x).square().mean().backward()
            one.step()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_layers_that_leave_together_share_a_group() -> None:
    model = network()
    optimizer = RegionOptimizer(model, OptimConfig(), hand_overs=dict.fromkeys(model[:4].parameters(), 2))
    sizes = [len(group["params"]) for group in optimizer.optimizer.param_groups]
    assert sorted(sizes) == [2, 5]


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        (["--localized.rule=frozen", *ANNEALED], "freezeout"),
        (["--localized.rule=frozen", "--selection.kind=linear"], "freezing"),
        (["--localized.rule=hebbian", *ANNEALED], "hebbian_linear_annealed"),
        (["--localized.rule=hebbian", "--selection.kind=linear"], "hebbian_linear"),
        (["--localized.rule=hebbian", "--selection.criterion=relative_drift"], "hebbian_relative_drift"),
        (
            ["--localized.rule=hebbian", "--selection.kind=static", "--selection.criterion=relative_drift"],
            "local_sgd_static",
        ),
    ],
)
def test_strategies_are_told_apart(arguments: list[str], strategy: str) -> None:
    assert strategy_of(parse_config(arguments)) == strategy


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--selection.anneal=true"], "selection.anneal=true needs hand-overs known in advance"),
        ([*ANNEALED, "--localized.refresh_every=4"], "selection.anneal=true needs localized.refresh_every=0, got 4"),
    ],
)
def test_what_does_not_go_with_annealing_is_named(arguments: list[str], said: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(parse_config([*arguments, f"--run.dir={tmp_path / 'run'}"]))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
