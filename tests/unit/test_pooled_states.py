"""States of several ranks as one, and the norms that cannot be pooled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from locsgd_dist.distributed import pool_states, refuse_synchronised_norms


def test_statistics_of_ranks_are_those_of_all_their_samples():
    torch.manual_seed(0)
    samples = (
        torch.randn(4, 50, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + torch.arange(4)[:, None, None]
    )
    states = [
        {
            "norm.running_mean": rank.mean(0).float(),
            "norm.running_var": rank.var(0, correction=0).float(),
            "norm.num_batches_tracked": torch.tensor(7 + number),
            "conv.weight": torch.full((2,), float(number)),
        }
        for number, rank in enumerate(samples)
    ]
    pooled = pool_states(states)
    together = samples.flatten(0, 1)
    torch.testing.assert_close(pooled["norm.running_mean"], together.mean(0).float())
    torch.testing.assert_close(pooled["norm.running_var"], together.var(0, correction=0).float())
    assert pooled["norm.num_batches_tracked"] == 7
    assert pooled["conv.weight"].tolist() == [1.5, 1.5]


def test_equal_states_keep_their_bits():
    state = {"norm.running_mean": torch.randn(100) * 100, "norm.running_var": torch.rand(100) * 1e-3}
    for name, value in pool_states([state] * 3).items():
        assert torch.equal(value, state[name]), name


def test_norms_that_exchange_statistics_are_refused_on_several_ranks():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    refuse_synchronised_norms(model, 1)
    refuse_synchronised_norms(nn.Sequential(nn.BatchNorm2d(4)), 2)
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        refuse_synchronised_norms(model, 2)
