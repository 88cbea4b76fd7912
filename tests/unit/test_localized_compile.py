"""torch.compile traces the hooks into the network's one graph; updates are those of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from localized_networks import PlainConvolutions
from torch import Tensor, nn
from torch._dynamo.utils import counters

from locsgd_dist.localized import LocalizedLearner


class Net(nn.Module):
    """In-place activations right behind the layers, batch norm, a grouped convolution, a linear map on 3-d input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.mix = nn.Linear(8, 8)
        self.conv3 = nn.Conv2d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x))
        x = self.mix(x.flatten(2).mT).relu_().mT.reshape(x.shape)
        x = self.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(
    model: nn.Module, learner: LocalizedLearner, boundaries: list[int], *, steps: int = 3, micro_batches: int = 1
) -> None:
    generator = torch.Generator().manual_seed(0)
    for boundary in boundaries:
        learner.advance(boundary)
        torch._dynamo.reset()
        for _ in range(steps):
            for _ in range(micro_batches):
                model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
            learner.apply()


def eager_and_compiled(
    rule: str, boundaries: list[int], *, backend: str, steps: int = 3, micro_batches: int = 1
) -> tuple[nn.Module, nn.Module]:
    """The same steps on the same network, first in eager mode, then compiled in place."""
    torch.manual_seed(0)
    eager = Net()
    compiled = copy.deepcopy(eager)
    for model in (eager, compiled):
        learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), rule=rule, lr=0.1)
        if model is compiled:
            model.compile(backend=backend, fullgraph=True)
        train(model, learner, boundaries, steps=steps, micro_batches=micro_batches)
    return eager, compiled


def assert_equal_weights(eager: nn.Module, compiled: nn.Module) -> None:
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-5, atol=1e-5)


# `eager` runs what dynamo traced, `aot_eager` also removes in-place operations as inductor does.
@pytest.mark.parametrize(
    ("rule", "backend"), [("hebbian", "aot_eager"), ("anti_hebbian", "eager"), ("frozen", "eager")]
)
def test_one_graph_gives_the_updates_of_eager_mode_across_shifts(rule: str, backend: str) -> None:
    eager, compiled = eager_and_compiled(rule, [0, 2, 4], backend=backend)
    assert_equal_weights(eager, compiled)
    assert not counters["graph_break"]
    # One graph per boundary: the second step of each finds what the first has compiled.
    assert counters["stats"]["unique_graphs"] == 3


def test_micro_batches_compile_once_more_at_most() -> None:
    """The second micro-batch adds to what the first has gathered, which is another graph."""
    eager, compiled = eager_and_compiled("hebbian", [3], backend="eager", micro_batches=3)
    assert_equal_weights(eager, compiled)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_drawn_direction_is_part_of_the_graph_whatever_the_step() -> None:
    eager, compiled = eager_and_compiled("random", [4], backend="eager", steps=12)
    assert_equal_weights(eager, compiled)
    assert counters["stats"]["unique_graphs"] == 1


def test_dynamo_explains_no_break() -> None:
    model = PlainConvolutions()
    learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8))
    learner.advance(3)
    explanation = torch._dynamo.explain(model)(torch.randn(2, 3, 8, 8))
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0


def test_a_compiled_network_gathers_neither_in_evaluation_nor_where_it_is_discarded() -> None:
    model = PlainConvolutions()
    learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8))
    learner.advance(2)
    model.compile(backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    learner.apply()
    model.eval()
    model(x)
    model.train()
    with learner.discarding():
        model(x)
    assert not learner.deltas
    model(x)
    assert learner.deltas.keys() == {0, 1}


@pytest.mark.parametrize("rule", ["oja", "softhebb", "winner", "centred", "hebbian_relative"])
def test_every_rule_is_part_of_the_graph(rule: str) -> None:
    eager, compiled = eager_and_compiled(rule, [4], backend="eager")
    assert_equal_weights(eager, compiled)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_steps_that_rest_and_steps_that_are_looked_at_have_a_graph_each() -> None:
    """However many steps: one graph that updates, one that rests, one through the whole network that is observed."""
    weights = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = Net()
        learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), lr=0.1, update_every=5)
        learner.advance(4)
        if compiles:
            model.compile(backend="eager", fullgraph=True)
        observed_in = []
        for step in range(20):
            x = torch.randn(4, 3, 8, 8)
            if step % 4 == 3:
                with learner.observing() as observed, learner.refreshing():
                    model(x).square().mean().backward()
                observed_in.append(sorted(observed))
                model.zero_grad(set_to_none=True)
            else:
                model(x).square().mean().backward()
                learner.apply()
                learner.finish_step()
        assert observed_in == [[0, 1, 2, 3]] * 5
        weights.append(model)
    assert_equal_weights(*weights)
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_that_is_looked_at_has_eager_modes_gradients_and_updates(recompute: bool) -> None:
    """Through the whole network, the region recomputed in the backward pass or not; other steps update in between."""
    seen: list[dict[str, Tensor]] = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = Net()
        learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), lr=0.1)
        learner.advance(4)
        if compiles:
            model.compile(backend="eager")
        found: dict[str, Tensor] = {}
        for step in range(8):
            x = torch.randn(4, 3, 8, 8)
            if step % 4 == 3:
                with learner.observing() as observed, learner.refreshing(recompute=recompute, gathers=True):
                    model(x).square().mean().backward()
                found |= {f"update {step} {index}": delta for index, delta in observed.items()}
                found |= {f"gradient {step} {key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
                model.zero_grad(set_to_none=True)
            else:
                model(x).square().mean().backward()
                learner.apply()
                learner.finish_step()
                model.zero_grad(set_to_none=True)
        seen.append(found | dict(model.state_dict()))
    eager, compiled = seen
    assert sum(key.startswith("update") for key in eager) == 2 * 4
    assert eager.keys() == compiled.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5, msg=key)
