"""Localized rules against eqs. 3 and 4 written out tap by tap in float64."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locsgd_dist.localized import (
    Layer,
    LocalizedLearner,
    LocalizedRule,
    make_rule,
    register_rule,
    rule_names,
    weight_gradient,
)
from locsgd_dist.localized.rules.registry import _RULES

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIDES = {1: (17,), 2: (9, 8), 3: (6, 5, 7)}


def padded(module: nn.Module, a: Tensor) -> Tensor:
    """The input as the convolution sees it, padded as torch's documentation says."""
    before, after = [], []
    for axis in range(a.dim() - 2):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if module.padding == "valid":
            widths = 0, 0
        elif module.padding == "same":
            widths = reach // 2, reach - reach // 2
        else:
            widths = module.padding[axis], module.padding[axis]
        before.append(widths[0])
        after.append(widths[1])
    # F.pad names the last axis first.
    amounts = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(a, amounts, mode=mode)


def outer_products(module: nn.Module, a: Tensor, error: Tensor) -> Tensor:
    """Sum over samples and positions of ``error (x) patch(a)``, one kernel tap at a time, in float64."""
    a, error = a.double(), error.double()
    if isinstance(module, nn.Linear):
        return torch.einsum("no,ni->oi", error.reshape(-1, error.shape[-1]), a.reshape(-1, a.shape[-1]))
    a = padded(module, a)
    groups, positions = module.groups, error.shape[2:]
    error = error.reshape(len(error), groups, error.shape[1] // groups, -1)
    delta = torch.zeros(module.weight.shape, dtype=torch.float64)
    for tap in itertools.product(*(range(size) for size in module.kernel_size)):
        window = a[
            (
                ...,
                *(
                    slice(t * d, t * d + (p - 1) * s + 1, s)
                    for t, d, s, p in zip(tap, module.dilation, module.stride, positions, strict=True)
                ),
            )
        ]
        window = window.reshape(len(a), groups, a.shape[1] // groups, -1)
        delta[(..., *tap)] = torch.einsum("ngop,ngip->goi", error, window).flatten(0, 1)
    return delta


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """By the norm of the difference: single elements of a sum may cancel to nearly nothing."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= relative * expected.norm()


CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {"kernel_size": 3}),
    (2, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": 1, "stride": 2, "bias": False}),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (2, {"kernel_size": 7, "stride": 4, "padding": 3}),
    (2, {"kernel_size": 3, "dilation": 2, "padding": 2}),
    (2, {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 3), "padding": (0, 2)}),
    (2, {"kernel_size": 3, "padding": "valid", "stride": 3}),
    (2, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    (2, {"kernel_size": (2, 4), "padding": "same"}),
    (2, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    (2, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "stride": 2}),
    (2, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"}),
    (2, {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"}),
    (2, {"kernel_size": 3, "groups": 2, "padding": 1, "stride": 2}),
    (2, {"kernel_size": 3, "groups": 4, "padding": 1}),  # depthwise
    (2, {"kernel_size": 5, "groups": 4, "out_channels": 8, "stride": 2, "dilation": 1}),  # with a multiplier
    (1, {"kernel_size": 5, "padding": 2}),
    (1, {"kernel_size": 4, "stride": 3, "dilation": 2, "groups": 2}),
    (1, {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}),
    (1, {"kernel_size": 3, "groups": 4}),
    (3, {"kernel_size": 3, "padding": 1}),
    (3, {"kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 1), "groups": 2}),
    (3, {"kernel_size": 2, "padding": "same", "padding_mode": "circular"}),
    (3, {"kernel_size": 3, "groups": 4, "dilation": (1, 2, 1), "padding": 2}),
]


def describe(case: tuple[int, dict[str, Any]]) -> str:
    return f"{case[0]}d " + " ".join(f"{key}={value}" for key, value in case[1].items())


@pytest.fixture(params=CASES, ids=describe)
def convolution(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    dims, options = request.param
    torch.manual_seed(0)
    module = CONVOLUTIONS[dims](
        4,
        options.get("out_channels", 8 if options.get("groups", 1) < 4 else 4),
        **{key: value for key, value in options.items() if key != "out_channels"},
    )
    return module.requires_grad_(False), torch.randn(3, 4, *SIDES[dims])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions(convolution: tuple[nn.Module, Tensor], dtype: torch.dtype) -> None:
    module, a = convolution
    a = a.to(dtype)
    z = module.to(dtype)(a)
    # bf16 keeps 8 bits of the sum; the operands are the same rounded ones on both sides.
    relative = 1e-5 if dtype == torch.float32 else 5e-3
    assert_close(weight_gradient(module, a, z), outer_products(module, a, z), relative)
    error = torch.randn_like(z)  # the position of a product does not follow from z itself
    assert_close(weight_gradient(module, a, error), outer_products(module, a, error), relative)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_without_a_batch_dimension(convolution: tuple[nn.Module, Tensor]) -> None:
    module, a = convolution
    z = module(a[0])
    assert_close(weight_gradient(module, a[0], z), outer_products(module, a[:1], z[None]), 1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_changes_nothing(dims: int) -> None:
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    torch.manual_seed(0)
    module = CONVOLUTIONS[dims](4, 8, 3, padding=1, stride=2).requires_grad_(False)
    a = torch.randn(3, 4, *SIDES[dims])
    expected = outer_products(module, a, module(a))
    module.to(memory_format=layout)
    a = a.to(memory_format=layout)
    assert_close(weight_gradient(module, a, module(a)), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 5, 6), (2, 3, 4, 6)], ids=lambda shape: f"{len(shape)}d")
def test_linear_maps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Linear(6, 4).requires_grad_(False).to(dtype)
    a = torch.randn(shape).to(dtype)
    relative = 1e-5 if dtype == torch.float32 else 5e-3
    for error in (module(a), torch.randn_like(module(a))):
        assert_close(weight_gradient(module, a, error), outer_products(module, a, error), relative)


@pytest.mark.parametrize("magnitude", [30.0, 1e-2], ids=["large", "small"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 160, 160)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 160, 160)),
        (nn.Linear(6, 4), (32, 1600, 6)),
    ],
    ids=["dense", "depthwise", "linear"],
)
def test_half_precision_neither_overflows_nor_vanishes(
    module: nn.Module, shape: tuple[int, ...], magnitude: float
) -> None:
    """Over fifty thousand positions: their plain sum exceeds what float16 holds, a mean of small values underflows."""
    torch.manual_seed(0)
    a = torch.rand(shape).half()
    error = (torch.rand_like(module(a.float())) * magnitude).half()
    expected = outer_products(module, a, error)
    if magnitude > 1:
        assert expected.max() > torch.finfo(torch.float16).max
    assert_close(weight_gradient(module, a, error), expected, 2e-3)


class Net(nn.Module):
    """A strided, a depthwise and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.depthwise(self.conv(x).relu()).mean((2, 3)))


LAYERS = ("conv", "depthwise", "fc")


def learner_of(rule: str | LocalizedRule, *, seed: int = 0, **options: Any) -> tuple[Net, LocalizedLearner, Tensor]:
    torch.manual_seed(0)
    model = Net()
    learner = LocalizedLearner(model, torch.zeros(1, 3, 12, 12), rule=rule, seed=seed, **options)
    learner.advance(3)
    return model, learner, torch.randn(4, 3, 12, 12)


def record_operands(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each layer in the last forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0].clone(), output.clone())})
        )
    return seen


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rule", ["hebbian", "anti_hebbian"])
def test_equation_4(rule: str, sign: float) -> None:
    model, learner, x = learner_of(rule, lr=0.03)
    operands = record_operands(model)
    before = {name: model.get_submodule(name).weight.detach().double() for name in LAYERS}
    learner.sign = sign
    model(x)
    learner.apply()
    direction = sign if rule == "hebbian" else -sign
    for name in LAYERS:
        module = model.get_submodule(name)
        delta = outer_products(module, *operands[name])
        expected = before[name] + direction * 0.03 * delta / delta.norm()
        torch.testing.assert_close(module.weight.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["hebbian", "anti_hebbian", "random"])
def test_a_step_has_the_length_eta_in_each_layer(rule: str) -> None:
    model, learner, x = learner_of(rule, lr=0.5)
    before = {name: model.get_submodule(name).weight.clone() for name in LAYERS}
    model(x)
    learner.apply()
    for name in LAYERS:
        moved = model.get_submodule(name).weight - before[name]
        assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_anti_hebbian_mirrors_hebbian() -> None:
    weights = {}
    for rule in ("frozen", "hebbian", "anti_hebbian"):
        model, learner, x = learner_of(rule)
        model(x)
        learner.apply()
        weights[rule] = [model.get_submodule(name).weight for name in LAYERS]
    for frozen, up, down in zip(*weights.values(), strict=True):
        assert not torch.equal(up, frozen)
        torch.testing.assert_close(up + down, 2 * frozen, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast a layer takes a float32 input and gives half-precision ``z``; the update stays float32."""
    model, learner, x = learner_of("hebbian")
    operands = record_operands(model)
    with torch.autocast("cpu", dtype):
        model(x)
    for layer in learner.layers:
        a, z = operands[layer.name]
        assert z.dtype == dtype
        assert_close(learner.deltas[layer.index], outer_products(layer.module, a.to(dtype), z), 5e-3)
    learner.apply()
    assert all(model.get_submodule(name).weight.dtype == torch.float32 for name in LAYERS)


def test_a_network_in_bf16_learns() -> None:
    torch.manual_seed(0)
    model = Net().bfloat16()
    learner = LocalizedLearner(model, torch.zeros(1, 3, 12, 12, dtype=torch.bfloat16), lr=1.0)
    learner.advance(3)
    before = model.conv.weight.clone()
    model(torch.randn(4, 3, 12, 12, dtype=torch.bfloat16))
    learner.apply()
    assert model.conv.weight.dtype == torch.bfloat16
    assert (model.conv.weight - before).float().norm().item() == pytest.approx(1.0, rel=1e-2)


def test_a_zero_update_leaves_its_layer_where_it_is() -> None:
    model, learner, x = learner_of("hebbian")
    before = {name: model.get_submodule(name).weight.clone() for name in LAYERS}
    model(torch.zeros_like(x))  # conv sees zeros; what follows sees its bias
    learner.apply()
    assert torch.equal(model.conv.weight, before["conv"])
    assert not torch.equal(model.fc.weight, before["fc"])
    assert torch.isfinite(model.fc.weight).all()


def test_frozen_leaves_everything_as_it_is() -> None:
    model, learner, x = learner_of("frozen")
    before = [p.clone() for p in model.parameters()]
    model(x)
    assert not learner.deltas
    assert not any(module._forward_hooks for module in model.modules())
    learner.apply()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def drawn(seed: int, steps: int) -> list[list[Tensor]]:
    """Directions that the rule `random` takes in each of some steps, per layer."""
    model, learner, x = learner_of("random", seed=seed)
    found = []
    for step in range(steps):
        torch.manual_seed(step)  # the global generator has no say
        model(torch.randn_like(x))
        found.append([learner.deltas[i].clone() for i in range(3)])
        learner.apply()
    return found


def test_random_is_a_function_of_seed_layer_and_step() -> None:
    first, again, other = drawn(0, 2), drawn(0, 2), drawn(1, 2)
    for step, layer in itertools.product(range(2), range(3)):
        assert torch.equal(first[step][layer], again[step][layer])

    def cosine(a: Tensor, b: Tensor) -> float:
        size = min(a.numel(), b.numel())
        return F.cosine_similarity(a.flatten()[:size], b.flatten()[:size], dim=0).abs().item()

    # 162 weights: independent directions have a cosine of about 1 / sqrt(162) = .08.
    assert cosine(first[0][0], first[1][0]) < 0.4
    assert cosine(first[0][0], other[0][0]) < 0.4
    assert cosine(first[0][0], first[0][1]) < 0.6  # 54 weights in common
    assert abs(first[0][0].mean().item()) < 4 / math.sqrt(162)


def test_random_adds_up_over_micro_batches_of_one_step() -> None:
    model, learner, x = learner_of("random")
    model(x)
    one = learner.deltas[0].clone()
    model(-x)
    torch.testing.assert_close(learner.deltas[0], 2 * one)


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


@pytest.mark.usefixtures("registry")
def test_a_rule_of_ones_own() -> None:
    @register_rule("mean_free")
    class MeanFree(LocalizedRule):
        """Another error in the same product, and a step twice as long."""

        def signal(self, layer: Layer, z: Tensor) -> Tensor:
            return z - z.mean(dim=0)

        def step(self, weights: list[Tensor], deltas: list[Tensor], size: float) -> None:
            super().step(weights, deltas, 2 * size)

    assert "mean_free" in rule_names()
    assert type(make_rule("mean_free")) is MeanFree
    model, learner, x = learner_of("mean_free", lr=0.01)
    operands = record_operands(model)
    before = model.fc.weight.detach().double()
    model(x)
    learner.apply()
    a, z = operands["fc"]
    delta = outer_products(model.fc, a, z - z.mean(dim=0))
    torch.testing.assert_close(model.fc.weight.double(), before + 0.02 * delta / delta.norm(), rtol=0, atol=1e-7)
    register_rule("mean_free")(MeanFree)  # the same class again does no harm
    with pytest.raises(ValueError, match="a localized rule named 'mean_free' is registered already"):
        register_rule("mean_free")(type("Other", (LocalizedRule,), {}))


@pytest.mark.usefixtures("registry")
def test_a_rule_given_as_an_object() -> None:
    class Doubled(LocalizedRule):
        def delta(self, layer: Layer, a: Tensor, z: Tensor, step: Tensor) -> Tensor:
            return torch.full_like(layer.weight, 2.0) + step

    model, learner, x = learner_of(Doubled())
    for step in range(2):
        model(x)
        assert (learner.deltas[1] == 2.0 + step).all()
        learner.apply()


def test_a_rule_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from locsgd_dist.localized import LocalizedRule\n\nclass Own(LocalizedRule):\n    pass\n\nOTHER = dict\n"
    (tmp_path / "a_users_rules.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    rule = make_rule("a_users_rules:Own", seed=7)
    assert (type(rule).__name__, rule.seed) == ("Own", 7)
    assert "a_users_rules:Own" not in rule_names()
    for name, said in (
        ("a_users_rules:Missing", "cannot be imported"),
        ("no_such_module:Own", "cannot be imported"),
        (":Own", "cannot be imported"),
        (".relative:Own", "cannot be imported"),
        ("a_users_rules:OTHER", "must be a class derived from LocalizedRule"),
    ):
        with pytest.raises(ValueError, match=rf"^localized\.rule {re.escape(name)} {said}") as error:
            make_rule(name)
        assert "\n" not in str(error.value)


def test_the_rules_there_are() -> None:
    assert {"hebbian", "frozen", "random", "anti_hebbian"} <= set(rule_names())
    assert rule_names() == sorted(rule_names())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hebian", ["localized.rule must be one of none, ", "hebbian", "did you mean 'hebbian'?", "got 'hebian'"]),
        ("zzz", ["localized.rule must be one of none, ", "anti_hebbian", "got 'zzz'"]),
    ],
)
def test_an_unknown_rule_is_named_in_one_line(name: str, said: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^localized\.rule") as error:
        make_rule(name)
    assert all(part in str(error.value) for part in said)
    assert "\n" not in str(error.value)
