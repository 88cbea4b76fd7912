"""The localized step compared with the true gradient, and updates in every m-th step only, on any number of ranks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import LAYERS, NormNet, PlainNet, Weights, assert_bit_equal, local_update, samples, weights_of
from torch import Tensor, nn

from locsgd_dist.data import Batch
from locsgd_dist.distributed import Alignment, Refresh, RegionDDP, ReplicaConfig, Traffic, make_replicas
from locsgd_dist.distributed.replicas import assign_owners
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.step import Tally, TrainConfig, TrainStep

OPTIM = OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-2)
CPU = torch.device("cpu")
BATCH = 8


class Training:
    """The trainer's own step on one rank; global batch ``t`` is ``samples(BATCH, t)``."""

    def __init__(
        self,
        model: nn.Module,
        boundary: int,
        *,
        rule: str = "hebbian",
        mode: Any = "sharded",
        window: int = 1,
        update_every: int = 1,
        refresh_every: int = 0,
        refresh_fraction: float = 1.0,
        alignment_every: int = 0,
        recompute: bool = False,
        micro_batches: int = 1,
    ):
        self.model, self.micro_batches = model, micro_batches
        self.learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), rule=rule, lr=0.02, update_every=update_every)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        group = dist.group.WORLD if dist.is_initialized() else None
        traffic = Traffic()
        self.region = RegionDDP(model, group, traffic)
        self.replicas = make_replicas(ReplicaConfig(mode, window), self.learner, group, traffic)
        config = LocalizedConfig(
            refresh_every=refresh_every,
            refresh_fraction=refresh_fraction,
            refresh_recompute=recompute,
            alignment_every=alignment_every,
        )
        self.refresh = Refresh(self.learner, group, traffic, config)
        self.alignment = Alignment(
            self.learner, self.refresh, group, traffic, config, sums_updates=mode == "all_reduce"
        )
        self.optimizer = RegionOptimizer(model, OPTIM, keeps_released=refresh_every > 0)
        self.step = TrainStep(
            TrainConfig(device="cpu"),
            self.region,
            self.replicas,
            self.optimizer,
            refresh=self.refresh,
            alignment=self.alignment,
            world_size=self.world_size,
            device=CPU,
        )
        self.optimizer.release(self.learner.advance(boundary))
        self.region.refresh()
        self.replicas.refresh()
        self.num_steps = 0

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            images, targets = samples(BATCH, self.num_steps)
            images, targets = images[self.rank :: self.world_size], targets[self.rank :: self.world_size]
            parts = zip(images.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True)
            batches = [Batch(x, y, len(x) * self.world_size, len(x)) for x, y in parts]
            self.step(batches, Tally(CPU))
            self.num_steps += 1


def cosines(model: PlainNet, boundary: int, images: Tensor, targets: Tensor, shares: list[Tensor]) -> list[float]:
    """Of the Hebbian update from each layer's share of the batch and the descent direction, by autograd alone."""
    model = copy.deepcopy(model).requires_grad_(True)
    F.cross_entropy(model(images), targets).backward()
    found = []
    for index in range(boundary):
        gradient = getattr(model, LAYERS[index]).weight.grad.flatten()
        update = local_update(model, index, shares[index]).flatten()
        found.append(F.cosine_similarity(update, -gradient, dim=0).item())
    return found


def test_a_tried_step_leaves_nothing_for_the_next_measurement() -> None:
    measured = []
    for tries in (False, True):
        torch.manual_seed(0)
        training = Training(PlainNet(), boundary=3, alignment_every=1)
        training.run()
        if tries:
            training.step.trial(2 * BATCH, (3, 8, 8), 4)
            assert all(parameter.grad is None for parameter in training.model.parameters())
        training.run()
        measured.append(training.alignment.take())
    assert measured[0] == measured[1]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("refresh_every", [0, 1])
@pytest.mark.parametrize(("rule", "sign"), [("hebbian", 1.0), ("hebbian", -1.0), ("anti_hebbian", 1.0)])
def test_cosine_is_that_of_autograd(rule: str, sign: float, refresh_every: int, recompute: bool) -> None:
    model = PlainNet()
    images, targets = samples(BATCH, 0)
    expected = cosines(model, 3, images, targets, [images] * 3)
    options = {"alignment_every": 1, "refresh_every": refresh_every, "recompute": recompute}
    training = Training(model, 3, rule=rule, micro_batches=2, **options)
    training.learner.sign = sign
    training.run()
    direction = sign if rule == "hebbian" else -sign
    taken = training.alignment.take()
    assert taken[:3] == pytest.approx([direction * cosine for cosine in expected], abs=1e-5)
    assert taken[3:] == [None, None]
    assert training.alignment.take() == [None] * 5


def test_the_epochs_mean_is_over_the_steps_that_were_measured() -> None:
    training = Training(PlainNet(), 2, alignment_every=2)
    expected = []
    for step in range(5):
        if step % 2 == 1:
            images, targets = samples(BATCH, step)
            expected.append(cosines(training.model, 2, images, targets, [images] * 2))
        training.run()
    assert training.alignment.take()[:2] == pytest.approx(np.mean(expected, axis=0), abs=1e-5)


def test_it_counts_refresh_steps_where_there_are_some() -> None:
    training = Training(PlainNet(), 2, alignment_every=2, refresh_every=2)
    due = []
    for _ in range(8):
        due.append(training.alignment.is_due)
        training.run()
    assert due == [False, False, False, True] * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": True, "micro_batches": 2},
        {"update_every": 2, "window": 2},
        {"refresh_every": 2, "recompute": True},
        {"refresh_every": 2, "refresh_fraction": 0.5, "update_every": 2},
        {"rule": "oja", "update_every": 3},
    ],
    ids=str,
)
def test_measuring_changes_no_bit_of_the_training(options: dict[str, Any]) -> None:
    weights = []
    for every in (0, 1):
        training = Training(NormNet(), 2, alignment_every=every, **options)
        training.run(5)
        weights.append(weights_of(training.model))
        assert (training.alignment.take()[0] is not None) == bool(every)
    assert_bit_equal(weights)


def measured(options: dict[str, Any], steps: int) -> tuple[list[float | None], Weights, Weights]:
    torch.manual_seed(0)
    found = []
    for every in (0, 1):
        training = Training(PlainNet(), 3, alignment_every=every, **options)
        training.run(steps)
        training.replicas.synchronise()
        found.append(weights_of(training.model))
    return training.alignment.take(), *found


@pytest.mark.parametrize("mode", ["sharded", "all_reduce", "periodic"])
def test_ranks_agree_on_what_each_mode_would_apply(mode: str, two_ranks: Any) -> None:
    results = two_ranks.run(measured, {"mode": mode, "window": 2 if mode != "all_reduce" else 1}, 1)
    model = PlainNet()
    images, targets = samples(BATCH, 0)
    halves = [images[0::2], images[1::2]]
    if mode == "all_reduce":
        expected = cosines(model, 3, images, targets, [images] * 3)
    elif mode == "periodic":
        expected = np.mean([cosines(model, 3, images, targets, [half] * 3) for half in halves], axis=0)
    else:
        layers = LocalizedLearner(model, images[:1]).layers[:3]
        owners = {layer.index: rank for rank, owned in enumerate(assign_owners(layers, 2)) for layer in owned}
        expected = cosines(model, 3, images, targets, [halves[owners[index]] for index in range(3)])
    for taken, _, _ in results:
        assert taken == results[0][0]
        assert taken[:3] == pytest.approx(expected, abs=1e-5)
        assert taken[3:] == [None, None]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sharded", "window": 2, "update_every": 2},
        {"mode": "all_reduce", "refresh_every": 3, "update_every": 2},
        {"mode": "periodic", "window": 2, "recompute": True},
    ],
    ids=str,
)
def test_measuring_changes_no_bit_on_two_ranks(options: dict[str, Any], two_ranks: Any) -> None:
    for taken, without, with_measuring in two_ranks.run(measured, options, 6):
        assert taken[0] is not None
        assert_bit_equal([without, with_measuring])


def test_what_has_been_measured_survives_a_restart() -> None:
    whole = Training(PlainNet(), 2, alignment_every=2)
    whole.run(7)
    first = Training(PlainNet(), 2, alignment_every=2)
    first.run(3)
    second = Training(PlainNet(), 2, alignment_every=2)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.alignment.load_state_dict(copy.deepcopy(first.alignment.state_dict()))
    second.num_steps = 3
    second.run(4)
    assert second.alignment.take() == whole.alignment.take()


def test_a_layer_without_a_gradient_or_an_update_is_not_measured() -> None:
    model = PlainNet()
    with torch.no_grad():
        model.conv4.weight.zero_()  # nothing before it reaches the loss
    training = Training(model, 3, alignment_every=1)
    training.run()
    assert training.alignment.take() == [None] * 5


# --- updates in every m-th step -----------------------------------------------------------------------------------


def moved(options: dict[str, Any], steps: int) -> tuple[list[bool], Weights]:
    """Whether the first layer moved in each step, and the weights at the end."""
    training = Training(PlainNet(), 3, **options)
    weights = [training.model.conv1.weight.detach().clone()]
    for _ in range(steps):
        training.run()
        weights.append(training.model.conv1.weight.detach().clone())
    return [not torch.equal(a, b) for a, b in itertools.pairwise(weights)], weights_of(training.model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"update_every": 1}, "111111"),
        ({"update_every": 3}, "001001"),
        # Refresh steps move it too, and are not counted: updates in the second of three others.
        ({"update_every": 2, "refresh_every": 3}, "011011"),
        ({"update_every": 2, "refresh_every": 2, "rule": "frozen"}, "010101"),
    ],
    ids=str,
)
def test_the_region_rests_between_updates(options: dict[str, Any], expected: str) -> None:
    assert "".join(str(int(step)) for step in moved(options, 6)[0]) == expected


def test_windows_are_counted_in_updates(two_ranks: Any) -> None:
    results = two_ranks.run(moved, {"update_every": 2, "window": 2}, 8)
    assert_bit_equal([weights for _, weights in results])
    assert results[0][0] == [False] * 3 + [True] + [False] * 3 + [True]


def test_each_update_is_as_long_as_without_rests() -> None:
    """Plain torch in one process: eq. 4 on the batch of every third step, SGD in all."""
    model = PlainNet()
    localized = LAYERS[:3]
    model.freeze(3)
    sgd = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=OPTIM.lr, momentum=0.9, weight_decay=1e-2
    )
    for step in range(6):
        images, targets = samples(BATCH, step)
        updates = [local_update(model, index, images) for index in range(3)]
        sgd.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        sgd.step()
        if step % 3 == 2:
            for name, update in zip(localized, updates, strict=True):
                getattr(model, name).weight.data += 0.02 * update / update.norm()
    _, weights = moved({"update_every": 3}, 6)
    for name, value in weights_of(model).items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def test_where_it_stands_between_updates_is_restored() -> None:
    training = Training(PlainNet(), 2, update_every=3)
    due = []
    for _ in range(7):
        restored = Training(PlainNet(), 0, update_every=3)
        restored.learner.load_state_dict(training.learner.state_dict())
        training = restored
        due.append(training.step.is_update_due)
        training.run()
    assert due == [False, False, True, False, False, True, False]


def test_a_step_that_is_tried_computes_the_update() -> None:
    training = Training(PlainNet(), 2, update_every=5, alignment_every=5)
    shapes: list[int] = []
    delta = training.learner.rule.delta
    training.learner.rule.delta = lambda layer, a, z, step: shapes.append(len(a)) or delta(layer, a, z, step)  # type: ignore[method-assign]
    training.step.trial(6, (3, 8, 8), 5)
    assert shapes == [6, 6]
    assert not training.learner.deltas
    assert not training.learner.is_update_due
    training.run(4)
    assert shapes == [6, 6]
    assert training.alignment.take() == [None] * 5
    training.run()
    assert shapes == [6, 6, BATCH, BATCH]
