"""Diagnostics against torch.linalg.svdvals and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from localized_networks import PlainConvolutions, build
from torch import Tensor

from locsgd_dist.localized import LocalizedLearner, WeightTrace, effective_rank, trace_layers


def rank_from_singular_values(weight: Tensor) -> float:
    squared = torch.linalg.svdvals(weight.double().flatten(1)).square()
    total = squared.sum().item()
    if total == 0:
        return 0.0
    share = [s / total for s in squared.tolist()]
    return math.exp(-sum(s * math.log(s) for s in share if s > 0))


@pytest.mark.parametrize(
    "shape", [(8, 20), (20, 8), (16, 16), (64, 3, 7, 7), (32, 1, 3, 3), (6, 4, 3), (4, 2, 2, 2, 2), (1, 30), (30, 1)]
)
def test_effective_rank_of_random_weights(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    assert effective_rank(weight).item() == pytest.approx(rank_from_singular_values(weight), rel=1e-5)


def test_effective_rank_of_a_nearly_collapsed_weight() -> None:
    """Every filter along one direction but for a thousandth: where squaring would lose digits in float32."""
    torch.manual_seed(0)
    weight = torch.outer(torch.randn(16), torch.randn(40)) + 1e-3 * torch.randn(16, 40)
    found = effective_rank(weight).item()
    assert found == pytest.approx(rank_from_singular_values(weight), rel=1e-5)
    assert 1 < found < 1.01


@pytest.mark.parametrize("n", [1, 2, 7])
def test_effective_rank_in_closed_form(n: int) -> None:
    assert effective_rank(torch.eye(n)).item() == pytest.approx(n)
    assert effective_rank(3.0 * torch.eye(n, 9)).item() == pytest.approx(n)
    assert effective_rank(torch.ones(n, 5)).item() == pytest.approx(1.0)
    # Two directions with energies 1 and 3: entropy of (1/4, 3/4).
    weight = torch.diag(torch.tensor([1.0, math.sqrt(3.0)]))
    assert effective_rank(weight).item() == pytest.approx(4 / 3**0.75, rel=1e-6)


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 4), torch.full((3, 4), math.nan), torch.tensor([[1.0, math.inf]])], ids=str
)
def test_a_weight_without_directions_has_rank_0(weight: Tensor) -> None:
    assert effective_rank(weight).item() == 0.0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_effective_rank_does_not_depend_on_scale(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 12)
    assert effective_rank(scale * weight).item() == pytest.approx(effective_rank(weight).item(), rel=1e-5)


def test_norm_update_and_drift_in_closed_form() -> None:
    model = PlainConvolutions()
    layers = trace_layers(model, torch.zeros(1, 3, 8, 8))
    sizes = [layer.weight.numel() for layer in layers]
    trace = WeightTrace(layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight.fill_(1.0)
        trace.begin()
        for index, layer in enumerate(layers):
            layer.weight.add_(0.5 * index)
    found = trace.end()
    assert found.update_norm == pytest.approx([0.5 * i * math.sqrt(n) for i, n in enumerate(sizes)])
    assert found.norm == pytest.approx([(1 + 0.5 * i) * math.sqrt(n) for i, n in enumerate(sizes)])
    assert found.drift == pytest.approx([0.5 * i / (1 + 0.5 * i) for i in range(len(sizes))])
    assert found.effective_rank == pytest.approx([1.0] * len(sizes))


def test_each_epoch_is_measured_from_its_own_beginning() -> None:
    model = PlainConvolutions()
    layers = trace_layers(model, torch.zeros(1, 3, 8, 8))
    trace = WeightTrace(layers)
    weight = layers[0].weight
    found = []
    for epoch in range(3):
        trace.begin()
        with torch.no_grad():
            weight[0, 0, 0, 0] += 10.0**epoch
        found.append(trace.end().update_norm[0])
    assert found == pytest.approx([1.0, 10.0, 100.0], rel=1e-5)


def test_a_layer_of_zeros_drifts_by_nothing() -> None:
    model = PlainConvolutions()
    layers = trace_layers(model, torch.zeros(1, 3, 8, 8))
    trace = WeightTrace(layers)
    trace.begin()
    with torch.no_grad():
        layers[1].weight.zero_()
    found = trace.end()
    assert found.update_norm[1] > 0
    assert found.drift[1] == 0.0
    assert found.effective_rank[1] == 0.0


def test_localized_steps_in_one_direction_add_up_to_their_number_times_eta() -> None:
    """The same batch and a network that hardly moves: n steps of length eta go n * eta far."""
    model, x = build("plain")
    learner = LocalizedLearner(model, x[:1], lr=1e-4)
    learner.advance(1)
    trace = WeightTrace(learner.layers)
    trace.begin()
    for _ in range(10):
        model(x)
        learner.apply()
    found = trace.end()
    assert found.update_norm[0] == pytest.approx(1e-3, rel=1e-3)
    assert found.update_norm[1:] == [0.0] * 3


def test_attention_and_half_precision_weights_have_diagnostics() -> None:
    model, x = build("vision_transformer")
    layers = trace_layers(model.bfloat16(), x[:1].bfloat16())
    trace = WeightTrace(layers)
    trace.begin()
    found = trace.end()
    for layer, norm, rank in zip(layers, found.norm, found.effective_rank, strict=True):
        assert norm == pytest.approx(layer.weight.double().norm().item(), rel=1e-5)
        assert rank == pytest.approx(rank_from_singular_values(layer.weight), rel=1e-4)
    assert len(found.norm) == 8
