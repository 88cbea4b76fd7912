"""Replicas of the localized region: what each mode computes, how it keeps ranks equal, what it sends and when."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import (
    LAYERS,
    NormNet,
    PlainNet,
    PlainTraining,
    Weights,
    assert_bit_equal,
    assert_close,
    local_update,
    samples,
    weights_of,
)
from torch import Tensor, nn

from locsgd_dist.distributed import RegionDDP, ReplicaConfig, Traffic, make_replicas
from locsgd_dist.distributed.replicas import assign_owners
from locsgd_dist.localized import Layer, LocalizedLearner, LocalizedRule

GLOBAL_BATCH = 12
LOCAL_LR = 0.02


class Training:
    """The loop that the modes are written for, on one rank; global batch ``t`` is ``samples(GLOBAL_BATCH, t)``."""

    def __init__(
        self,
        mode: str,
        every: int = 1,
        *,
        boundary: int = 0,
        model: nn.Module | None = None,
        rule: str | LocalizedRule = "hebbian",
        channels_last: bool = False,
        overlap: bool = True,
    ) -> None:
        self.model = PlainNet() if model is None else model
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self.learner = LocalizedLearner(self.model, torch.zeros(1, 3, 8, 8), rule=rule, lr=LOCAL_LR)
        self.learner.advance(boundary)
        self.traffic = Traffic()
        self.region = RegionDDP(self.model, dist.group.WORLD, self.traffic)
        config = ReplicaConfig(mode=mode, every=every)
        self.replicas = make_replicas(config, self.learner, dist.group.WORLD, self.traffic, overlap=overlap)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        self.steps = 0

    def shift(self, boundary: int) -> None:
        self.replicas.synchronise()
        for parameter in self.learner.advance(boundary):
            self.optimizer.state.pop(parameter, None)
        self.region.refresh()
        self.replicas.refresh()

    def step(self, micro_batches: int = 1) -> None:
        images, targets = samples(GLOBAL_BATCH, seed=self.steps)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        images = images[rank::world_size].contiguous(memory_format=self.memory_format)
        micro = list(zip(images.chunk(micro_batches), targets[rank::world_size].chunk(micro_batches), strict=True))
        for x, y in micro[:-1]:
            with self.region.no_sync():
                self._forward_backward(x, y, micro_batches)
        self.replicas.arm()
        self._forward_backward(*micro[-1], micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.replicas.finish_step()
        self.steps += 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def _forward_backward(self, images: Tensor, targets: Tensor, micro_batches: int) -> None:
        loss = F.cross_entropy(self.region(images), targets) / micro_batches
        self.replicas.start()
        if loss.requires_grad:
            loss.backward()

    def localized(self) -> Weights:
        return {name: getattr(self.model, name).weight.detach().numpy().copy() for name in LAYERS[: self.boundary]}

    @property
    def boundary(self) -> int:
        return self.learner.boundary


def localized_bytes(boundary: int) -> int:
    model = PlainNet()
    return sum(4 * getattr(model, name).weight.numel() for name in LAYERS[:boundary])


# --- all ranks equal ----------------------------------------------------------------------------------------------


def train_long(mode: str, every: int, channels_last: bool) -> list[Weights]:
    """Weights after each stretch between shifts; the last ones after 200 steps with every layer localized."""
    training = Training(mode, every, model=NormNet(), channels_last=channels_last)
    seen = []
    for steps, boundary in ((43, 1), (54, 3), (53, 4), (50, 4)):
        training.run(steps)
        training.shift(boundary)
        seen.append({name: p.detach().numpy().copy() for name, p in training.model.named_parameters()})
    return seen


@pytest.mark.parametrize(
    ("mode", "every", "channels_last"),
    [("sharded", 8, True), ("sharded", 1, False), ("all_reduce", 1, False)],
)
def test_ranks_are_bit_equal_after_200_steps_with_shifts(
    ranks: Any, mode: str, every: int, channels_last: bool
) -> None:
    results = ranks.run(train_long, mode, every, channels_last)
    for states in zip(*results, strict=True):
        assert_bit_equal(states)
    stretches = results[0]
    assert all(np.isfinite(value).all() for value in stretches[-1].values())
    # The first layer has been localized since the first shift, and went on learning in every stretch.
    for before, after in itertools.pairwise(stretches):
        assert not np.array_equal(before["0.weight"], after["0.weight"])
        assert np.array_equal(before["1.weight"], after["1.weight"]), "a localized norm has moved"


def train_random(mode: str, every: int) -> tuple[Weights, Weights, Weights]:
    training = Training(mode, every, boundary=3, rule="random")
    states = [training.localized()]
    for _ in range(2):
        training.run(4)
        states.append(training.localized())
    return tuple(states)


@pytest.mark.parametrize(("mode", "every"), [("sharded", 4), ("sharded", 1), ("all_reduce", 1), ("periodic", 100)])
def test_rule_random_takes_the_same_steps_on_all_ranks(four_ranks: Any, mode: str, every: int) -> None:
    results = four_ranks.run(train_random, mode, every)
    for states in zip(*results, strict=True):
        assert_bit_equal(states)
    start, middle, end = results[0]
    for name in start:
        first, second = (middle[name] - start[name]).ravel(), (end[name] - middle[name]).ravel()
        length = np.linalg.norm(first)
        assert not np.allclose(first, second, atol=length / 10), "the same direction twice"
        if every == 4:
            assert length == pytest.approx(4 * LOCAL_LR, rel=1e-4)
        else:  # four independent steps
            assert LOCAL_LR < length < 4 * LOCAL_LR


# --- what is computed ---------------------------------------------------------------------------------------------


def train_short(mode: str, every: int, steps: int, channels_last: bool = False) -> Weights:
    """Weights after steps on either side of a shift from 2 to 4 layers."""
    training = Training(mode, every, boundary=2, channels_last=channels_last)
    training.run(steps)
    training.shift(4)
    training.run(steps)
    return weights_of(training.model)


@pytest.mark.parametrize("channels_last", [False, True])
def test_all_reduce_is_the_rule_on_the_whole_batch(ranks: Any, channels_last: bool) -> None:
    results = ranks.run(train_short, "all_reduce", 1, 4, channels_last)

    plain = PlainTraining(PlainNet(), local_lr=LOCAL_LR)
    for step in range(8):
        if step % 4 == 0:
            plain.shift(2 if step < 4 else 4)
        plain.step(*samples(GLOBAL_BATCH, step))
    for weights in results:
        assert_close(weights, weights_of(plain.model), rtol=1e-4, atol=5e-6)


def train_sharded(every: int, stretches: Sequence[int]) -> tuple[list[list[int]], list[Weights]]:
    """Indices owned by each rank, and localized weights after each stretch of steps, a flush in between."""
    training = Training("sharded", every, boundary=4)
    seen = [training.localized()]
    for steps in stretches:
        training.run(steps)
        training.replicas.synchronise()
        seen.append(training.localized())
    owners = assign_owners(training.learner.updated_layers, dist.get_world_size())
    return [[layer.index for layer in owned] for owned in owners], seen


def test_sharded_applies_the_update_of_each_layers_owner(ranks: Any) -> None:
    results = ranks.run(train_sharded, 1, [1])
    assert_bit_equal([after for _, (_, after) in results])
    owned, (before, after) = results[0]
    world_size = ranks.world_size
    images, _ = samples(GLOBAL_BATCH, 0)
    for index, name in enumerate(LAYERS[:4]):
        fits = []
        for rank in range(world_size):
            delta = local_update(PlainNet(), index, images[rank::world_size])
            expected = LOCAL_LR * delta / delta.norm()
            fits.append(np.allclose(after[name] - before[name], expected.numpy(), rtol=1e-3, atol=1e-6))
        assert fits == [index in owned[rank] for rank in range(world_size)], name


def test_sharded_gathers_eight_steps_and_a_flush_takes_what_is_there(ranks: Any) -> None:
    """11 steps and a flush: a window of 8 and one of 3; then a whole window of 8 again."""
    owned, seen = ranks.run(train_sharded, 8, [11, 8])[0]
    world_size = ranks.world_size
    owner = {index: rank for rank, indices in enumerate(owned) for index in indices}

    plain = PlainTraining(PlainNet(), local_lr=LOCAL_LR)
    plain.shift(4)
    step, expected = 0, []
    for window in (8, 3, 8):
        for _ in range(window):
            images, targets = samples(GLOBAL_BATCH, step)
            plain.step(images, targets, [images[owner[i] :: world_size] for i in range(4)], apply=0)
            step += 1
        plain.apply(window)
        expected.append(weights_of(plain.model))
    for weights, reference in zip(seen[1:], (expected[1], expected[2]), strict=True):
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, reference[f"{name}.weight"], rtol=1e-4, atol=5e-6, err_msg=name)


def weights_within_a_window() -> list[Weights]:
    training = Training("sharded", 4, boundary=3)
    seen = [training.localized()]
    for _ in range(8):
        training.step()
        seen.append(training.localized())
    return seen


def test_sharded_moves_only_at_the_end_of_a_window(two_ranks: Any) -> None:
    for seen in two_ranks.run(weights_within_a_window):
        moved = [any((a[n] != b[n]).any() for n in a) for a, b in itertools.pairwise(seen)]
        assert moved == [False, False, False, True] * 2
        for name in seen[0]:
            assert np.linalg.norm(seen[4][name] - seen[0][name]) == pytest.approx(4 * LOCAL_LR, rel=1e-4)


def drift(every: int, steps: int) -> tuple[list[Weights], bool]:
    training = Training("periodic", every, boundary=3, channels_last=True)
    pointers = [p.data_ptr() for p in training.model.parameters()]
    seen = []
    for _ in range(steps):
        training.step()
        seen.append(training.localized())
    training.replicas.synchronise()
    seen.append(training.localized())
    kept = pointers == [p.data_ptr() for p in training.model.parameters()] and all(
        getattr(training.model, name).weight.is_contiguous(memory_format=torch.channels_last) for name in LAYERS[:3]
    )
    return seen, kept


def test_periodic_averages_the_ranks_weights(ranks: Any) -> None:
    """Averages after 3 steps and, flushed, after 5; each rank learns from its own shard in between."""
    world_size = ranks.world_size
    results = ranks.run(drift, 3, 5)
    assert all(kept for _, kept in results), "the weights have another storage or memory format"

    alone = [PlainTraining(PlainNet(), local_lr=LOCAL_LR) for _ in range(world_size)]
    for plain in alone:
        plain.shift(3)
    for step in range(5):
        images, targets = samples(GLOBAL_BATCH, step)
        for rank, plain in enumerate(alone):
            plain.step(images[rank::world_size], targets[rank::world_size])
        if step == 2:
            average(alone)
        for rank, plain in enumerate(alone):
            assert_localized(results[rank][0][step], plain)
        states = [seen[step] for seen, _ in results]
        if step == 2:
            assert_bit_equal(states)
        else:
            assert not np.array_equal(states[0]["conv1"], states[1]["conv1"]), "ranks do not drift"
    average(alone)
    assert_localized(results[0][0][5], alone[0])
    assert_bit_equal([seen[5] for seen, _ in results])


@torch.no_grad()
def average(alone: Sequence[PlainTraining]) -> None:
    for name in LAYERS[:3]:
        weights = [getattr(plain.model, name).weight for plain in alone]
        mean = torch.stack(list(weights)).mean(dim=0)
        for weight in weights:
            weight.copy_(mean)


def assert_localized(weights: Weights, plain: PlainTraining) -> None:
    for name, weight in weights.items():
        expected = getattr(plain.model, name).weight.detach().numpy()
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=5e-6, err_msg=name)


def resume_within_a_window(mode: str, every: int) -> tuple[Weights, Weights]:
    """Weights of a run of 13 steps, and of one that stopped after 5 and went on in new objects from saved state."""
    whole = Training(mode, every, boundary=3)
    whole.run(13)

    first = Training(mode, every, boundary=3)
    first.run(5)
    second = Training(mode, every)
    second.model.load_state_dict(first.model.state_dict())
    second.learner.load_state_dict(first.learner.state_dict())
    second.region.refresh()
    second.replicas.refresh()
    second.replicas.load_state_dict(first.replicas.state_dict())
    second.steps = first.steps
    second.run(8)
    return whole.localized(), second.localized()


@pytest.mark.parametrize(("mode", "every"), [("sharded", 8), ("periodic", 4), ("all_reduce", 1)])
def test_state_saved_within_a_window_goes_on(two_ranks: Any, mode: str, every: int) -> None:
    for whole, resumed in two_ranks.run(resume_within_a_window, mode, every):
        assert_bit_equal([whole, resumed])


# --- bytes and moments --------------------------------------------------------------------------------------------


def count_bytes(mode: str, every: int, boundary: int, rule: str = "hebbian") -> list[int]:
    training = Training(mode, every, boundary=boundary, rule=rule)
    counted = []
    for _ in range(8):
        training.step()
        taken = training.traffic.take()
        assert (taken.replica_collectives > 0) == (taken.replica_bytes > 0)
        counted.append(taken.replica_bytes)
    training.replicas.synchronise()
    return [*counted, training.traffic.take().replica_bytes]


@pytest.mark.parametrize("boundary", [0, 1, 4, 5])
@pytest.mark.parametrize(
    ("mode", "every", "sent_after"),
    [
        ("sharded", 1, {0, 1, 2, 3, 4, 5, 6, 7}),
        ("sharded", 3, {2, 5, 8}),
        ("all_reduce", 8, {0, 1, 2, 3, 4, 5, 6, 7}),
        ("periodic", 3, {2, 5, 8}),
    ],
)
def test_replica_bytes_are_counted(two_ranks: Any, mode: str, every: int, sent_after: set[int], boundary: int) -> None:
    """Every localized weight once per exchange; index 8 is the flush."""
    payload = localized_bytes(boundary)
    expected = [payload if step in sent_after else 0 for step in range(9)]
    assert two_ranks.run(count_bytes, mode, every, boundary) == [expected] * 2


@pytest.mark.parametrize("mode", ["sharded", "all_reduce", "periodic"])
def test_a_frozen_region_sends_nothing(two_ranks: Any, mode: str) -> None:
    assert two_ranks.run(count_bytes, mode, 2, 3, "frozen") == [[0] * 9] * 2


def watch_exchange(mode: str, every: int, overlap: bool) -> dict[str, Any]:
    """Collectives started before a module of the SGD region runs, per forward pass."""
    training = Training(mode, every, boundary=2, overlap=overlap)
    started: list[int] = []
    training.model.fc.register_forward_hook(lambda *_: started.append(training.traffic.replica_collectives))
    seen: dict[str, Any] = {"steps": []}
    for _ in range(2):
        training.step(micro_batches=3)
        seen["steps"].append((list(started), training.traffic.take().replica_collectives > 0))
        started.clear()

    before = {index: delta.clone() for index, delta in training.learner.deltas.items()}
    images, _ = samples(4, 0)
    training.model.eval()
    training.model(images)
    training.model.train()
    with training.learner.discarding():
        training.model(images)
    after = training.learner.deltas
    seen["other_passes"] = list(started)
    seen["deltas_kept"] = before.keys() == after.keys() and all(torch.equal(before[i], after[i]) for i in before)
    return seen


@pytest.mark.parametrize("mode", ["sharded", "all_reduce"])
def test_the_exchange_runs_beside_the_sgd_region(two_ranks: Any, mode: str) -> None:
    """With the last micro-batch alone it has begun before the forward pass is over."""
    for seen in two_ranks.run(watch_exchange, mode, 1, True):
        for started, sent in seen["steps"]:
            assert started[:2] == [0, 0]
            assert started[2] > 0
            assert sent
        assert seen["other_passes"] == [0, 0]
        assert seen["deltas_kept"]


def test_the_exchange_waits_for_the_end_of_the_window(two_ranks: Any) -> None:
    for seen in two_ranks.run(watch_exchange, "sharded", 2, True):
        (first, first_sent), (second, second_sent) = seen["steps"]
        assert first == [0, 0, 0]
        assert not first_sent
        assert second[:2] == [0, 0]
        assert second[2] > 0
        assert second_sent


def test_without_overlap_the_exchange_starts_behind_the_forward_pass(two_ranks: Any) -> None:
    for seen in two_ranks.run(watch_exchange, "sharded", 1, False):
        assert seen["steps"] == [([0, 0, 0], True)] * 2


def train_without_start(mode: str) -> tuple[Weights, Weights, int]:
    """The same step by a loop that arms too late and starts nothing, and by the one that does as it should; bytes that
    an evaluation sends after the first."""
    images, targets = samples(GLOBAL_BATCH, 0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bare, full = Training(mode, boundary=3), Training(mode, boundary=3)
    F.cross_entropy(bare.region(images[rank::world_size]), targets[rank::world_size]).backward()
    bare.replicas.arm()
    bare.replicas.finish_step()
    bare.traffic.take()
    bare.model.eval()(images)
    full.step()
    return bare.localized(), full.localized(), bare.traffic.take().replica_bytes


@pytest.mark.parametrize("mode", ["sharded", "all_reduce"])
def test_a_step_that_started_no_exchange_makes_it_up(two_ranks: Any, mode: str) -> None:
    results = two_ranks.run(train_without_start, mode)
    assert_bit_equal([state for bare, full, _ in results for state in (bare, full)])
    assert [sent for *_, sent in results] == [0, 0]


# --- owners -------------------------------------------------------------------------------------------------------


def layers_of(macs: Sequence[int]) -> list[Layer]:
    return [Layer(index, f"layer{index}", nn.Linear(1, 1), (), count) for index, count in enumerate(macs)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "macs",
    [[5], [7, 7, 7], [1, 2, 3, 4, 5, 6], [100, 1, 1, 1, 1, 1], [9, 9, 8, 7, 6, 5, 5], [0, 0, 0, 0]],
)
def test_owners_share_the_work_evenly(macs: list[int], world_size: int) -> None:
    """No partition is better than 3/4 of the heaviest rank's work (Graham's bound for the largest first)."""
    owned = assign_owners(layers_of(macs), world_size)
    assert len(owned) == world_size
    assert sorted(layer.index for mine in owned for layer in mine) == list(range(len(macs)))
    assert all([layer.index for layer in mine] == sorted(layer.index for layer in mine) for mine in owned)

    def heaviest(owners: Sequence[int]) -> int:
        return max(sum(m for m, o in zip(macs, owners, strict=True) if o == rank) for rank in range(world_size))

    best = min(heaviest(owners) for owners in itertools.product(range(world_size), repeat=len(macs)))
    got = max(sum(macs[layer.index] for layer in mine) for mine in owned)
    assert got <= (4 / 3 - 1 / (3 * world_size)) * best
    # Layers of unknown cost are spread too.
    assert max(len(mine) for mine in owned) < len(macs) or world_size == 1 or len(macs) == 1
    again = assign_owners(layers_of(macs), world_size)
    assert [[layer.index for layer in mine] for mine in again] == [[layer.index for layer in mine] for mine in owned]


def owners_and_gathered() -> tuple[list[list[int]], list[int]]:
    training = Training("sharded", 2, boundary=4)
    training.step()
    owned = assign_owners(training.learner.updated_layers, dist.get_world_size())
    return [[layer.index for layer in mine] for mine in owned], sorted(training.learner.deltas)


def test_each_rank_computes_only_what_it_owns(ranks: Any) -> None:
    results = ranks.run(owners_and_gathered)
    assert all(owned == results[0][0] for owned, _ in results)
    assert [gathered for _, gathered in results] == results[0][0]


def test_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"^replicas\.every must be >= 1, got 0$"):
        ReplicaConfig(every=0)
