"""Replicas of the localized region: what each mode computes, and how it keeps ranks equal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
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
from replica_training import GLOBAL_BATCH, LOCAL_LR, Training

from locsgd_dist.distributed import ReplicaConfig, make_replicas
from locsgd_dist.distributed.replicas import assign_owners

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


def go_on_otherwise(mode: str, every: int, is_bad: bool) -> tuple[Weights, Weights, Weights, int]:
    """A window of three steps, closed as it was begun and in new objects of another mode, or of none: localized weights
    before and after, and how many updates go on waiting."""
    first = Training("sharded", 8, boundary=3)
    first.run(3)
    before = first.localized()
    gathered: list[dict[int, torch.Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, first.learner.deltas)
    learner_state = first.learner.state_dict()
    learner_state["deltas"] = {index: delta for of_rank in gathered for index, delta in of_rank.items()}
    state = first.replicas.state_dict() | {"window_is_bad": is_bad}

    second = Training("all_reduce" if mode == "alone" else mode, every)
    if mode == "alone":
        second.replicas = make_replicas(ReplicaConfig(), second.learner, None, second.traffic)
    second.model.load_state_dict(first.model.state_dict())
    second.learner.load_state_dict(learner_state)
    second.region.refresh()
    second.replicas.refresh()
    second.replicas.load_state_dict(state)
    first.replicas.synchronise()
    second.replicas.synchronise()
    return before, first.localized(), second.localized(), len(second.learner.deltas)


@pytest.mark.parametrize("is_bad", [False, True])
@pytest.mark.parametrize(("mode", "every"), [("alone", 1), ("periodic", 4), ("all_reduce", 1), ("sharded", 2)])
def test_a_window_ends_alike_whatever_goes_on_with_it(two_ranks: Any, mode: str, every: int, is_bad: bool) -> None:
    for before, closed, otherwise, waiting in two_ranks.run(go_on_otherwise, mode, every, is_bad):
        for name, weight in otherwise.items():
            assert not np.array_equal(before[name], closed[name])
            np.testing.assert_allclose(weight, before[name] if is_bad else closed[name], rtol=1e-6, atol=1e-7)
        assert waiting == 0


def summed_when_going_on_all_reduced() -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """What the owners have gathered in a window of three steps, and what all_reduce would sum of it."""
    owned = Training("sharded", 8, boundary=3)
    owned.run(3)
    training = Training("all_reduce", 1, boundary=3)
    world = dist.get_world_size()
    gathered: list[dict[int, torch.Tensor]] = [{}] * world
    dist.all_gather_object(gathered, owned.learner.deltas)
    whole = {index: delta for of_rank in gathered for index, delta in of_rank.items()}
    training.learner.deltas.update({index: delta.clone() for index, delta in whole.items()})
    training.replicas.load_state_dict(owned.replicas.state_dict())
    dist.all_gather_object(gathered, training.learner.deltas)
    summed = {
        index: sum(of_rank[index].numpy() for of_rank in gathered if index in of_rank)
        for index in range(len(LAYERS[:3]))
    }
    return {index: delta.numpy() for index, delta in whole.items()}, summed


def test_a_window_begun_under_sharded_counts_once_in_all_reduce(ranks: Any) -> None:
    for whole, summed in ranks.run(summed_when_going_on_all_reduced):
        assert set(whole) == {0, 1, 2}
        for index, delta in whole.items():
            np.testing.assert_array_equal(summed[index], delta)


def first_exchange_after(every: int) -> list[bool]:
    """Whether each of three steps exchanges updates, after three steps of a window of eight."""
    training = Training("sharded", 8, boundary=3)
    training.run(3)
    state, deltas = training.replicas.state_dict(), dict(training.learner.deltas)
    config = ReplicaConfig(mode="sharded", every=every)
    training.replicas = make_replicas(config, training.learner, dist.group.WORLD, training.traffic)
    training.learner.deltas.update(deltas)
    training.replicas.load_state_dict(state)
    training.traffic.take()
    exchanged = []
    for _ in range(3):
        training.step()
        exchanged.append(training.traffic.take().replica_bytes > 0)
    return exchanged


@pytest.mark.parametrize(("every", "expected"), [(2, [True, False, True]), (4, [True, False, False])])
def test_a_window_begun_under_a_larger_number_ends_with_the_next_step(
    two_ranks: Any, every: int, expected: list[bool]
) -> None:
    assert two_ranks.run(first_exchange_after, every) == [expected] * 2
