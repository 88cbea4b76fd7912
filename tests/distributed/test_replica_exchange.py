"""Replicas of the localized region: what each mode sends and when, and who computes what."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import (
    LAYERS,
    PlainNet,
    Weights,
    assert_bit_equal,
    samples,
)
from replica_training import GLOBAL_BATCH, Training
from torch import nn

from locsgd_dist.distributed import ReplicaConfig
from locsgd_dist.distributed.replicas import assign_owners
from locsgd_dist.localized import Layer


def localized_bytes(boundary: int) -> int:
    model = PlainNet()
    return sum(4 * getattr(model, name).weight.numel() for name in LAYERS[:boundary])


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
