"""Rules beyond the paper's, against loops over single positions in float64, closed forms and torch's own counters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from locsgd_dist.config import ConfigError, check_config, parse_config
from locsgd_dist.localized import Layer, LocalizedLearner, effective_rank, make_rule

RULES: list[tuple[str, dict[str, Any]]] = [
    ("centred", {}),
    ("oja", {}),
    ("softhebb", {"temperature": 0.5}),
    ("softhebb", {"temperature": 2.0, "losers": "hebbian"}),
    ("winner", {}),
    ("winner", {"k": 3}),
]
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dense": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (4, 3, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, bias=False), (4, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 4, 5, 5)),
    "unbatched": (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 7, 6)),
    "linear": (lambda: nn.Linear(5, 4), (8, 5)),
    "tokens": (lambda: nn.Linear(5, 4, bias=False), (2, 7, 5)),
    "vector": (lambda: nn.Linear(5, 4), (5,)),
}


def layer_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Layer, Tensor]:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    module = build().requires_grad_(False).to(dtype)
    return Layer(0, name, module, ()), (torch.randn(shape) + 0.3).to(dtype)


def positions(module: nn.Module, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [positions, channels] and the patches that they were made from [positions, groups, inputs]."""
    if isinstance(module, nn.Linear):
        return z.reshape(-1, z.shape[-1]).double(), a.reshape(-1, 1, a.shape[-1]).double()
    if a.dim() == 3:
        a, z = a[None], z[None]
    patches = F.unfold(a.double(), module.kernel_size, padding=module.padding, stride=module.stride)
    flat = patches.transpose(1, 2).reshape(-1, module.groups, patches.shape[1] // module.groups)
    return z.double().flatten(2).transpose(1, 2).reshape(len(flat), -1), flat


def written_out(name: str, options: dict[str, Any], module: nn.Module, a: Tensor, z: Tensor) -> Tensor:
    """The rule's update as its formula says, one position and one output channel at a time."""
    weight = module.weight.double().flatten(1)
    outputs, patches = positions(module, a, z)
    bias = 0 if module.bias is None else module.bias.double()
    responses = outputs - bias
    channels, per_group = len(weight), len(weight) // patches.shape[1]
    mean_output, mean_patch = outputs.mean(0), patches.mean(0)
    delta = torch.zeros_like(weight)
    for o, y, x in zip(outputs, responses, patches, strict=True):
        order = o.argsort(descending=True).tolist()
        for k in range(channels):
            group = k // per_group
            mine = x[group]
            if name == "centred":
                delta[k] += (o[k] - mean_output[k]) * (mine - mean_patch[group])
            elif name == "oja":
                peers = range(group * per_group, (group + 1) * per_group)
                delta[k] += y[k] * (mine - sum(y[j] * weight[j] for j in peers))
            else:
                if name == "winner":
                    share = float(k in order[: options.get("k", 1)])
                else:
                    share = ((o / options["temperature"]).exp() / (o / options["temperature"]).exp().sum())[k]
                    if options.get("losers") != "hebbian" and k != order[0]:
                        share = -share
                delta[k] += share * (mine - y[k] * weight[k])
    return delta.view(module.weight.shape)


def delta_of(name: str, options: dict[str, Any], layer: Layer, a: Tensor) -> tuple[Tensor, Tensor]:
    z = layer.module(a)
    return make_rule(name, 0, options).delta(layer, a, z, torch.zeros((), dtype=torch.int64)), z


def assert_close(actual: Tensor, expected: Tensor, relative: float, scale: Tensor | None = None) -> None:
    """By the norm of the difference, relative to that of ``scale``: of what the result is a difference."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= relative * (expected if scale is None else scale).norm() + 1e-6


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_updates_are_those_of_the_formula(name: str, options: dict[str, Any], layer_name: str) -> None:
    layer, a = layer_of(layer_name)
    delta, z = delta_of(name, options, layer, a)
    assert_close(delta, written_out(name, options, layer.module, a, z), 2e-5)


@pytest.mark.parametrize("layer_name", ["dense", "grouped", "tokens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), RULES[:5], ids=str)
def test_half_precision(name: str, options: dict[str, Any], layer_name: str, dtype: torch.dtype) -> None:
    layer, a = layer_of(layer_name, dtype)
    delta, z = delta_of(name, options, layer, a)
    outputs, patches = positions(layer.module, a, z)
    # Both terms of a difference are rounded: to half of the mantissa's last bit, by each of a few operations.
    scale = outputs.abs().sum(0).sum() * patches.abs().max()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    assert_close(delta, written_out(name, options, layer.module, a, z), tolerance, scale[None])


def test_half_precision_does_not_overflow_where_many_positions_are_summed() -> None:
    torch.manual_seed(0)
    layer = Layer(0, "conv", nn.Conv2d(2, 3, 1, bias=False).requires_grad_(False), ())
    a = torch.rand(2, 2, 160, 160).half()
    z = (10 * torch.rand(2, 3, 160, 160)).half()
    delta = make_rule("oja").delta(layer, a, z, torch.zeros((), dtype=torch.int64))
    y, x = (t.double().transpose(0, 1).flatten(1) for t in (z, a))
    assert (y @ y.T).max() > torch.finfo(torch.float16).max
    expected = y @ x.T - y @ y.T @ layer.weight.double().flatten(1)
    assert_close(delta, expected.view(delta.shape), 2e-3)


@pytest.mark.parametrize(("name", "options"), [*RULES, ("hebbian_relative", {})], ids=str)
def test_meta_tensors_give_the_shape_of_the_weight(name: str, options: dict[str, Any]) -> None:
    for layer_name in LAYERS:
        layer, a = layer_of(layer_name)
        layer.module.to("meta")
        delta, _ = delta_of(name, options, layer, a.to("meta"))
        assert (delta.shape, delta.dtype, delta.device.type) == (layer.weight.shape, torch.float32, "meta")
        make_rule(name, 0, options).step([layer.weight], [delta], 0.1)


# --- what the rules are for ---------------------------------------------------------------------------------------


def correlated(samples: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs [samples, 8] of known covariance and its eigenvectors, largest first."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    white = torch.linalg.qr(torch.randn(samples, 8, generator=generator))[0] * math.sqrt(samples)
    return white * torch.tensor([3.0, 2.5, 2.0, 0.6, 0.5, 0.4, 0.3, 0.2]) @ basis.T, basis


def learn(name: str, lr: float, steps: int, **options: Any) -> Tensor:
    """The weight [3, 8] of a linear layer after so many steps on :func:`correlated`."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3, bias=False)
    x, _ = correlated()
    learner = LocalizedLearner(model, x[:1], rule=make_rule(name, 0, options), lr=lr)
    learner.advance(1)
    for step in range(steps):
        learner.lr = lr * 0.99**step
        model(x)
        learner.apply()
    return model.weight.detach()


def test_oja_finds_an_orthonormal_basis_of_the_principal_subspace() -> None:
    weight = learn("oja", 0.1, 600)
    _, basis = correlated()
    principal = basis[:, :3]
    torch.testing.assert_close(weight @ weight.T, torch.eye(3), rtol=0, atol=5e-3)
    torch.testing.assert_close(weight.T @ weight, principal @ principal.T, rtol=0, atol=5e-3)


def test_oja_rests_on_any_orthonormal_basis_of_eigenvectors() -> None:
    x, basis = correlated()
    module = nn.Linear(8, 3, bias=False).requires_grad_(False)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))[0]
    module.weight.copy_(rotation @ basis[:, :3].T)
    layer = Layer(0, "", module, ())
    resting, _ = delta_of("oja", {}, layer, x)
    hebbian, _ = delta_of("hebbian", {}, layer, x)
    assert resting.norm() < 1e-5 * hebbian.norm()


def test_the_plain_rule_loses_the_rank_that_oja_keeps() -> None:
    assert effective_rank(learn("hebbian", 1.0, 400)) < 1.5
    assert effective_rank(learn("oja", 1.0, 400)) > 2.9


def test_centred_does_not_see_the_mean_input() -> None:
    layer, a = layer_of("tokens")
    here, _ = delta_of("centred", {}, layer, a)
    shifted, _ = delta_of("centred", {}, layer, a + torch.tensor([5.0, -3.0, 2.0, 0.0, 7.0]))
    assert_close(shifted, here.double(), 1e-4)
    plain, _ = delta_of("hebbian", {}, layer, a)
    moved, _ = delta_of("hebbian", {}, layer, a + 5)
    assert (moved - plain).norm() > plain.norm()


@pytest.mark.parametrize("name", ["softhebb", "winner"])
def test_competition_takes_prototypes_apart_and_their_norm_to_one(name: str) -> None:
    """Inputs are three orthogonal unit vectors: each filter becomes one of them."""
    model = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 4) * 0.5 + 0.1)
    options = {"temperature": 0.05} if name == "softhebb" else {}
    learner = LocalizedLearner(model, torch.zeros(1, 4), rule=make_rule(name, 0, options), lr=0.1)
    learner.advance(1)
    for step in range(300):
        learner.lr = 0.1 * 0.98**step
        model(torch.eye(3, 4))
        learner.apply()
    torch.testing.assert_close(model.weight.detach(), torch.eye(3, 4), rtol=0, atol=2e-2)


def test_a_cold_softmax_is_a_hard_winner() -> None:
    for layer_name in LAYERS:
        layer, a = layer_of(layer_name)
        cold, _ = delta_of("softhebb", {"temperature": 1e-6, "losers": "hebbian"}, layer, a)
        hard, _ = delta_of("winner", {}, layer, a)
        torch.testing.assert_close(cold, hard)


def test_more_winners_than_channels_are_all_channels() -> None:
    layer, a = layer_of("linear")
    assert torch.equal(delta_of("winner", {"k": 99}, layer, a)[0], delta_of("winner", {"k": 4}, layer, a)[0])


# --- the step -----------------------------------------------------------------------------------------------------


def stepped(weight: Tensor, delta: Tensor, size: float, length: str, hold_norm: bool) -> Tensor:
    """The step as the options describe it, filter by filter in float64."""
    weight, delta = weight.double(), delta.double()
    moved = weight.clone()
    for k in range(len(weight)):
        whole = {"absolute": delta.norm(), "layer": delta.norm(), "filter": delta[k].norm()}[length]
        unit = {"absolute": 1.0, "layer": weight.norm(), "filter": weight[k].norm()}[length]
        moved[k] += size * unit * delta[k] / whole
        if hold_norm:
            moved[k] *= weight[k].norm() / moved[k].norm()
    return moved


@pytest.mark.parametrize("rule", ["hebbian", "anti_hebbian"])
@pytest.mark.parametrize("hold_norm", [False, True])
@pytest.mark.parametrize("length", ["absolute", "layer", "filter"])
def test_step_lengths(length: str, hold_norm: bool, rule: str) -> None:
    torch.manual_seed(0)
    shapes = [(6, 3, 3, 3), (4, 1, 3), (5, 7)]
    weights, deltas = [torch.randn(s) for s in shapes], [100 * torch.randn(s) for s in shapes]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    size = 0.3 if rule == "hebbian" else -0.3
    expected = [stepped(w, d, size, length, hold_norm) for w, d in zip(weights, deltas, strict=True)]
    make_rule(rule, 0, {"length": length, "hold_norm": hold_norm}).step(weights, deltas, 0.3)
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.double(), value, rtol=1e-5, atol=1e-5)


def test_hebbian_relative_turns_each_filter_and_keeps_its_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6))
    learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), rule="hebbian_relative", lr=0.05)
    learner.advance(2)
    before = [layer.weight.detach().double().flatten(1) for layer in learner.layers]
    model(torch.randn(4, 3, 8, 8))
    expected = [stepped(w, learner.deltas[i].flatten(1), 0.05, "filter", hold_norm=True) for i, w in enumerate(before)]
    learner.apply()
    for layer, start, end in zip(learner.layers, before, expected, strict=True):
        weight = layer.weight.detach().double().flatten(1)
        torch.testing.assert_close(weight, end, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight.norm(dim=1), start.norm(dim=1), rtol=1e-5, atol=0)
        assert (weight - start).norm() > 0.01


@pytest.mark.parametrize("options", [{"length": "filter"}, {"length": "layer", "hold_norm": True}])
def test_a_filter_without_an_update_or_without_a_norm_stays_as_it_is(options: dict[str, Any]) -> None:
    weight, delta = torch.randn(3, 4), torch.randn(3, 4)
    delta[0], weight[1] = 0, 0
    before = weight.clone()
    make_rule("hebbian", 0, options).step([weight], [delta], 0.1)
    assert torch.isfinite(weight).all()
    assert torch.equal(weight[0], before[0])
    if options["length"] == "filter":
        assert torch.equal(weight[1], before[1])
    assert not torch.equal(weight[2], before[2])


# --- costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_name", ["dense", "linear", "tokens"])
@pytest.mark.parametrize("name", ["hebbian", "hebbian_relative", "centred", "oja", "softhebb", "winner", "random"])
def test_multiply_adds_are_those_that_torch_counts(name: str, layer_name: str) -> None:
    build, shape = LAYERS[layer_name]
    model = build()
    learner = LocalizedLearner(model, torch.zeros(shape), rule=name)
    learner.advance(1)
    (layer,) = learner.layers
    for batch in (shape[0], 3 * shape[0]):
        counter = FlopCounterMode(display=False)
        x = torch.randn(batch, *shape[1:])
        with counter:
            model(x)
        forward = 2 * batch * layer.macs
        assert counter.get_total_flops() - forward == 2 * learner.rule.macs(layer, batch)


def test_multiply_adds_of_grouped_convolutions() -> None:
    """torch's counter forgets groups. Per position and group: outputs x inputs, outputs x outputs; once: the decay."""
    for layer_name, num_positions, groups, outputs, inputs in (("grouped", 16, 2, 3, 12), ("depthwise", 25, 4, 1, 9)):
        build, shape = LAYERS[layer_name]
        (layer,) = LocalizedLearner(build(), torch.zeros(shape)).layers
        hebbian = num_positions * groups * outputs * inputs
        oja = hebbian + num_positions * groups * outputs**2
        once = groups * outputs**2 * inputs
        assert make_rule("winner").macs(layer, 5) == 5 * hebbian
        assert make_rule("oja").macs(layer, 5) == 5 * oja + once


# --- options ------------------------------------------------------------------------------------------------------


def test_options_come_from_the_configuration() -> None:
    arguments = ["--localized.rule=softhebb", '--localized.rule_options={"temperature": 2, "hold_norm": true}']
    rule = parse_config(arguments).localized.make_rule(seed=3)
    assert (rule.temperature, rule.hold_norm, rule.losers, rule.seed) == (2, True, "anti_hebbian", 3)
    dotted = parse_config(["--localized.rule=winner", "--localized.rule_options.k=2"])
    assert dotted.localized.make_rule().k == 2


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("softhebb", {"temprature": 1}, ["rule softhebb takes temperature, losers, length, hold_norm", "'temprature'"]),
        ("softhebb", {"temperature": "warm"}, ["localized.rule_options.temperature must be a number, got 'warm'"]),
        ("softhebb", {"temperature": True}, ["localized.rule_options.temperature must be a number, got True"]),
        ("softhebb", {"temperature": 0}, ["localized.rule_options.temperature must be > 0, got 0"]),
        ("softhebb", {"temperature": math.nan}, ["localized.rule_options.temperature must be > 0, got nan"]),
        ("softhebb", {"losers": "none"}, ["localized.rule_options.losers must be one of anti_hebbian, hebbian, got"]),
        ("winner", {"k": 1.5}, ["localized.rule_options.k must be a whole number, got 1.5"]),
        ("winner", {"k": 0}, ["localized.rule_options.k must be >= 1, got 0"]),
        ("hebbian", {"length": "long"}, ["localized.rule_options.length must be one of absolute, layer, filter, got"]),
        ("oja", {"hold_norm": 1}, ["localized.rule_options.hold_norm must be true or false, got 1"]),
        ("frozen", {"k": 1}, ["localized.rule_options: rule frozen takes none; got 'k'"]),
        ("none", {"k": 1}, ["localized.rule_options must be empty for localized.rule=none, got {'k': 1}"]),
    ],
)
def test_a_wrong_option_is_one_line(rule: str, options: dict[str, Any], said: list[str]) -> None:
    listed = [f"{key}: {value!r}".replace("True", "true").replace("nan", ".nan") for key, value in options.items()]
    config = parse_config([f"--localized.rule={rule}", f"--localized.rule_options={{{', '.join(listed)}}}"])
    with pytest.raises(ConfigError) as error:
        check_config(config, where="elsewhere")
    assert all(part in str(error.value) for part in said), str(error.value)
    assert "\n" not in str(error.value)
