"""Batch-norm statistics of all ranks together, and rank 0's other buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plain_reference import Weights, assert_bit_equal, weights_of
from torch import Tensor, nn

from locsgd_dist.distributed import pool_buffers

CHANNELS = 3


class Buffered(nn.Module):
    """Norms of several kinds, one of them used twice, and buffers of several types that belong to no norm."""

    def __init__(self) -> None:
        super().__init__()
        # With momentum 1 the running statistics are those of the last batch; None: the mean over all batches.
        self.image = nn.BatchNorm2d(CHANNELS, momentum=1.0)
        self.same = self.image
        self.mean_of_batches = nn.BatchNorm2d(CHANNELS, momentum=None, affine=False)
        self.vector = nn.BatchNorm1d(CHANNELS, momentum=1.0)
        self.instance = nn.InstanceNorm2d(CHANNELS, momentum=1.0, track_running_stats=True)
        self.stateless = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
        rank = dist.get_rank()
        self.register_buffer("counter", torch.tensor(10 + rank))
        self.register_buffer("mask", torch.tensor([rank == 0, rank == 1]))
        self.register_buffer("table", torch.full((2, 3), 0.5 + rank, dtype=torch.float64).T)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("transient", torch.full((2,), float(rank)), persistent=False)

    def forward(self, x: Tensor) -> None:
        for norm in (self.image, self.mean_of_batches, self.instance, self.stateless):
            norm(x)
        self.vector(x.mean(dim=(2, 3)))


def rank_batches(rank: int, offset: float) -> list[np.ndarray]:
    """Two batches [6, C, 4, 4] of a distribution of the rank's own."""
    generator = np.random.default_rng(rank)
    return [
        (offset + rank + (1 + rank) * generator.standard_normal((6, CHANNELS, 4, 4))).astype(np.float32)
        for _ in range(2)
    ]


def pool(offset: float, grouped: bool) -> tuple[Weights, Weights, list[float]]:
    torch.manual_seed(dist.get_rank())
    model = Buffered()
    with torch.no_grad():
        model.image.weight.uniform_()
    for batch in rank_batches(dist.get_rank(), offset):
        model(torch.from_numpy(batch))
    before = weights_of(model)
    pool_buffers(model, dist.group.WORLD if grouped else None)
    return before, weights_of(model), model.transient.tolist()


def expected_statistics(world_size: int, offset: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of what each norm has seen, in double precision, over the samples of all ranks.

    Torch's running variance is the unbiased one of a batch of n. Ranks saw n samples each, so the variance over all of
    them is the mean of the ranks' biased variances plus the variance of their means; the bias of the first part is
    corrected as torch does it.
    """

    def pooled(per_rank: list[np.ndarray], axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        per_rank = [x.astype(np.float64) for x in per_rank]
        n = per_rank[0].size // CHANNELS
        everything = np.concatenate(per_rank)
        bias = np.mean([x.var(axis=axes) for x in per_rank], axis=0) / (n - 1)
        return everything.mean(axis=axes), everything.var(axis=axes) + bias

    last = [rank_batches(rank, offset)[-1] for rank in range(world_size)]
    statistics = {
        "image": pooled(last, (0, 2, 3)),
        "vector": pooled([x.mean(axis=(2, 3), dtype=np.float64) for x in last], (0,)),
    }
    # The mean over two batches, of means and of unbiased variances; then over ranks by the law of total variance.
    both = [[x.astype(np.float64) for x in rank_batches(rank, offset)] for rank in range(world_size)]
    means = np.array([np.mean([x.mean(axis=(0, 2, 3)) for x in batches], axis=0) for batches in both])
    variances = np.array([np.mean([x.var(axis=(0, 2, 3), ddof=1) for x in batches], axis=0) for batches in both])
    statistics["mean_of_batches"] = (means.mean(axis=0), variances.mean(axis=0) + means.var(axis=0))
    # An instance norm's: the mean over samples of each image's own statistics.
    means = np.array([x.astype(np.float64).mean(axis=(2, 3)).mean(axis=0) for x in last])
    variances = np.array([x.astype(np.float64).var(axis=(2, 3), ddof=1).mean(axis=0) for x in last])
    statistics["instance"] = (means.mean(axis=0), variances.mean(axis=0) + means.var(axis=0))
    return statistics


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_statistics_are_those_of_all_ranks_samples(ranks: Any, offset: float) -> None:
    """Far from zero too, where the squares of means leave little of the variance in single precision."""
    results = ranks.run(pool, offset, True)
    for _, after, _ in results:
        for name, (mean, variance) in expected_statistics(ranks.world_size, offset).items():
            # Torch keeps a mean in single precision: near 3000 its spacing is 2e-4.
            np.testing.assert_allclose(after[f"{name}.running_mean"], mean, rtol=1e-6, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(after[f"{name}.running_var"], variance, rtol=1e-3, err_msg=name)


def test_buffers_are_bit_equal_and_parameters_untouched(ranks: Any) -> None:
    results = ranks.run(pool, 0.0, True)
    before, after, transient = zip(*results, strict=True)
    parameters = {"image.weight", "image.bias", "same.weight", "same.bias", "vector.weight", "vector.bias"}
    parameters |= {"stateless.weight", "stateless.bias"}
    buffers = after[0].keys() - parameters
    assert_bit_equal([{name: state[name] for name in buffers} for state in after])
    for own, pooled in zip(before, after, strict=True):
        assert_bit_equal([{name: state[name] for name in parameters} for state in (own, pooled)])
    assert not np.array_equal(after[0]["image.weight"], after[1]["image.weight"])

    for name in ("counter", "mask", "table", "image.num_batches_tracked"):
        assert_bit_equal([{name: before[0][name]}, *({name: state[name]} for state in after)])
    assert after[-1]["counter"] == 10
    assert after[-1]["counter"].dtype == np.int64
    assert after[-1]["mask"].tolist() == [True, False]
    assert (after[-1]["table"] == 0.5).all()
    assert transient == ([0.0, 0.0],) * ranks.world_size


def test_a_world_of_one_keeps_its_buffers(two_ranks: Any) -> None:
    for before, after, _ in two_ranks.run(pool, 0.0, False):
        assert_bit_equal([before, after])


def pool_without_norms() -> list[list[float]]:
    bare = nn.Linear(2, 2)
    pool_buffers(bare, dist.group.WORLD)
    counting = nn.Linear(2, 2)
    counting.register_buffer("seen", torch.tensor([float(dist.get_rank())]))
    pool_buffers(counting, dist.group.WORLD)
    return [counting.seen.tolist()]


def test_networks_without_norms_or_buffers(two_ranks: Any) -> None:
    assert two_ranks.run(pool_without_norms) == [[[0.0]]] * 2
