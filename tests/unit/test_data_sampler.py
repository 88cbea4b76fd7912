"""Permutation and cursor by brute force: whatever the batch and world sizes do, each sample comes once."""

import random

import pytest
import torch

from locsgd_dist.data.sampler import EpochSampler, Step
from locsgd_dist.memory import BatchConfig


def sampler(num: int, *, seed: int = 0, rank: int = 0, world_size: int = 1, per_gpu: int = 4) -> EpochSampler:
    return EpochSampler(num, seed=seed, rank=rank, world_size=world_size, per_gpu=per_gpu)


def order(num: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    """The epoch's permutation, as one rank sees it in one step."""
    whole = sampler(num, seed=seed, per_gpu=num)
    whole.move_to(epoch, 0)
    (step,) = whole.remaining()
    return step.indices.tolist()


@pytest.mark.parametrize("num", [1, 7, 64, 101])
def test_permutation_is_one_per_seed_and_epoch(num: int) -> None:
    assert sorted(order(num)) == list(range(num))
    assert order(num, seed=3, epoch=5) == order(num, seed=3, epoch=5)
    if num > 7:
        orders = [order(num, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
        assert len({tuple(o) for o in orders}) == 9
        assert list(range(num)) not in orders


@pytest.mark.parametrize("trial", range(30))
def test_changing_batch_and_world_sizes_neither_repeat_nor_miss_a_sample(trial: int) -> None:
    rng = random.Random(trial)
    num, epoch = rng.randint(1, 200), rng.randint(0, 3)
    expected = order(num, seed=trial, epoch=epoch)
    cursor = 0
    while cursor < num:
        world_size, per_gpu = rng.randint(1, 5), rng.randint(1, 20)
        steps: list[Step] = []
        for rank in range(world_size):
            # A world of a new size starts from nothing but the position.
            one = sampler(num, seed=trial, rank=rank, world_size=world_size, per_gpu=per_gpu)
            one.move_to(epoch, cursor)
            steps.append(next(iter(one.remaining())))
        due = expected[cursor : cursor + world_size * per_gpu]
        for rank, step in enumerate(steps):
            assert step.cursor == cursor
            assert step.global_size == len(due)
            mine = due[rank::world_size]
            assert step.local_size == len(mine)
            # A rank without a sample is given one to take part with.
            assert step.indices.tolist() == (mine or due[:1])
        cursor += len(due)


def test_plan_is_iterated_again_alike_and_knows_its_length() -> None:
    for num, start, per_gpu, world_size in [(10, 0, 3, 1), (10, 9, 3, 2), (10, 10, 3, 1), (24, 0, 4, 3), (25, 0, 4, 3)]:
        one = sampler(num, world_size=world_size, per_gpu=per_gpu)
        one.move_to(2, start)
        plan = one.remaining()
        first, second = ([step.indices.tolist() for step in plan] for _ in range(2))
        assert first == second
        assert len(first) == len(plan)
        assert plan.draw == 2


def test_plan_is_a_snapshot() -> None:
    one = sampler(10, per_gpu=2)
    plan = one.remaining()
    one.per_gpu = 5
    one.move_to(1, 5)
    assert [len(step.indices) for step in plan] == [2] * 5
    assert [len(step.indices) for step in one.remaining()] == [5]


def test_order_on_another_device_stays_the_same() -> None:
    plan = sampler(10).remaining().to(torch.device("meta"))
    assert [step.indices.shape[0] for step in plan] == [4, 4, 2]
    assert all(step.indices.is_meta for step in plan)


@pytest.mark.parametrize(("epoch", "cursor"), [(-1, 0), (0, -1), (0, 11)])
def test_impossible_positions_are_refused(epoch: int, cursor: int) -> None:
    one = sampler(10)
    with pytest.raises(ValueError, match=r"no position .* training set of 10 samples.*data\.train_samples"):
        one.move_to(epoch, cursor)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch\.per_gpu must be at least 1, got 0$"):
        BatchConfig(per_gpu=0)
    with pytest.raises(ValueError, match=r"^batch\.per_gpu must be at least 1, got -4$"):
        sampler(10).per_gpu = -4
    with pytest.raises(ValueError, match="rank must lie in"):
        sampler(10, rank=2, world_size=2)
