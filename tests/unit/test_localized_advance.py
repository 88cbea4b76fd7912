"""Layers handed over, and everything a caller may do to a network with a learner."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from localized_networks import build, loss_of, plain_learner
from torch import Tensor, nn

from locsgd_dist.localized import LocalizedLearner


def test_advance_hands_over_what_left_the_sgd_region() -> None:
    model, x = build("cifar_resnet18")
    learner = LocalizedLearner(model, x[:1])
    loss_of(model, x).backward()
    first = learner.advance(2)
    names = {id(p): key for key, p in model.named_parameters()}
    assert {names[id(p)] for p in first} == {
        *("conv1.weight", "bn1.weight", "bn1.bias"),
        *("layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias"),
    }
    assert all(p.grad is None and not p.requires_grad for p in first)
    kept = [p for p in model.parameters() if not any(p is q for q in first)]
    assert all(p.grad is not None and p.requires_grad for p in kept)
    second = learner.advance(3)
    assert {names[id(p)] for p in second} == {"layer1.0.conv2.weight", "layer1.0.bn2.weight", "layer1.0.bn2.bias"}
    assert learner.advance(3) == []
    assert learner.boundary == 3


def test_advance_registers_one_hook_a_layer_and_drops_what_was_gathered() -> None:
    model, learner, x = plain_learner(boundary=1)
    model(x)
    assert learner.deltas
    learner.advance(3)
    assert not learner.deltas
    learner.advance(3)
    assert [len(layer.module._forward_hooks) for layer in learner.layers] == [1, 1, 1, 0]
    model(x)
    once = learner.deltas[0].clone()
    learner.apply()
    fresh, _ = build("plain")
    reference = LocalizedLearner(fresh, x[:1])
    reference.advance(3)
    fresh(x)
    torch.testing.assert_close(once, reference.deltas[0])


@pytest.mark.parametrize("boundary", [1, -1, 5])
def test_the_boundary_neither_falls_nor_passes_the_network(boundary: int) -> None:
    _, learner, _ = plain_learner(boundary=2)
    with pytest.raises(ValueError, match=rf"must lie in \[2, 4\], got {boundary}$"):
        learner.advance(boundary)
    assert learner.boundary == 2


def test_a_layer_that_the_caller_froze_stays_frozen() -> None:
    model, x = build("plain")
    model.conv2.requires_grad_(False)
    learner = LocalizedLearner(model, x[:1], lr=0.1)
    learner.advance(3)
    assert [layer.name for layer in learner.updated_layers] == ["conv1", "conv3"]
    before = model.conv2.weight.clone()
    model(x)
    assert learner.deltas.keys() == {0, 2}
    learner.apply()
    assert torch.equal(model.conv2.weight, before)


def test_a_parametrized_layer_is_passed_over() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 16, 2),
    )
    x = torch.randn(2, 3, 8, 8)
    learner = LocalizedLearner(model, x[:1])
    learner.advance(2)
    before = copy.deepcopy(model[0].state_dict())
    model(x).sum().backward()
    assert learner.deltas.keys() == {1}
    learner.apply()
    assert all(torch.equal(value, before[key]) for key, value in model[0].state_dict().items())
    assert model[3].weight.grad is not None


def test_layers_called_by_keyword_learn() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(input=x))

    model = ByKeyword()
    learner = LocalizedLearner(model, torch.zeros(1, 4))
    learner.advance(1)
    x = torch.randn(3, 4)
    model(x)
    z = nn.functional.linear(x, model.first.weight, model.first.bias)
    torch.testing.assert_close(learner.deltas[0], z.T @ x)


def test_an_input_that_requires_a_gradient_is_refused() -> None:
    model, _, x = plain_learner()
    with pytest.raises(RuntimeError, match="localized layer 'conv1' is part of the autograd graph"):
        model(x.requires_grad_())


def test_a_copy_of_the_network_does_not_learn() -> None:
    model, learner, x = plain_learner()
    replica = copy.deepcopy(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    replica(x)
    averaged.train()
    averaged(x)
    assert not learner.deltas
    assert replica.state_dict().keys() == model.state_dict().keys()
    again = copy.deepcopy(replica)
    again(x)
    assert not learner.deltas
    model(x)
    assert learner.deltas.keys() == {0, 1}


def test_the_state_dict_keeps_the_plain_networks_keys() -> None:
    plain, _ = build("mobilenet_v2")
    model, x = build("mobilenet_v2", seed=1)
    learner = LocalizedLearner(model, x[:1])
    learner.advance(10)
    model(x)
    learner.apply()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize("rule", ["hebbian", "random"])
def test_a_restored_learner_goes_on_as_if_nothing_had_happened(rule: str, tmp_path: Path) -> None:
    """Saved between two micro-batches, read back as a checkpoint is (weights only)."""
    model, x = build("plain")
    learner = LocalizedLearner(model, x[:1], rule=rule, seed=3)
    learner.advance(2)
    learner.lr, learner.sign = 0.2, -1.0
    model(x)
    learner.apply()
    model(x)
    torch.save({"model": model.state_dict(), "learner": learner.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    resumed, _ = build("plain", seed=9)
    restored = LocalizedLearner(resumed, x[:1], rule=rule, seed=3)
    resumed.load_state_dict(state["model"])
    released = restored.load_state_dict(state["learner"])
    assert {id(p) for p in released} == {id(p) for p in restored.layers.parameters(0, 2).values()}
    for each, twin in ((model, learner), (resumed, restored)):
        each(x)
        twin.apply()
        each(x)
        twin.apply()
    assert restored.boundary == 2
    assert (restored.lr, restored.sign, restored.num_steps) == (0.2, -1.0, 3)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
