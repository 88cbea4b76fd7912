"""Buckets are cut as DDP cuts its own."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from locsgd_dist.distributed.buckets import cut


@pytest.mark.parametrize("seed", range(5))
def test_cut_as_torch_does(seed: int) -> None:
    draw = random.Random(seed)
    for count in (1, 2, 30):
        sizes = [4 * draw.randint(1, 100) for _ in range(count)]
        tensors = [torch.empty(size // 4, device="meta") for size in sizes]
        for capacity in (1, 4, 200, 300, 10_000):
            expected, _ = dist._compute_bucket_assignment_by_size(tensors, [capacity])
            assert [list(range(count))[bucket] for bucket in cut(sizes, capacity)] == expected


def test_nothing_makes_no_bucket() -> None:
    assert cut([], 100) == []
