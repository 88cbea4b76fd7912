"""Stochastic depth under data parallelism: what is skipped neither learns nor travels, and ranks stay equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import Weights, assert_bit_equal, assert_close, samples, weights_of
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from locsgd_dist.baselines.stochastic_depth import (
    StochasticDepth,
    StochasticDepthConfig,
    droppable_blocks,
    with_droppable_blocks,
)
from locsgd_dist.data import Batch
from locsgd_dist.distributed import RegionDDP, Traffic
from locsgd_dist.distributed.replicas import Replicas
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.step import Tally, TrainConfig, TrainStep

CPU = torch.device("cpu")
BLOCKS = 4
#: Global micro-batches of each step; the last one leaves ranks without a sample.
STEPS = ((8,), (8, 8), (8,), (8,), (8, 5), (8,), (1,))
SEED = 7


def network() -> nn.Sequential:
    """Residual blocks wide enough for several buckets (DDP's first holds 1 MiB); nothing couples samples of a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 200, 1), nn.ReLU())
        for _ in range(BLOCKS):
            block = InvertedResidual(200, 200, stride=1, expand_ratio=1)
            block.conv = nn.Sequential(nn.Conv2d(200, 200, 3, padding=1, bias=False), nn.Tanh())
            model.append(block)
        return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(200, 5)])


def micro_batches(step: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[:, :, :2, :2], y) for x, y in (samples(size, 10 * step + i) for i, size in enumerate(STEPS[step]))]


def train(compression: str, deterministic: bool) -> tuple[Weights, list[int], list[list[bool]]]:
    """Weights after the last step, bytes sent in each, and the blocks that each has dropped."""
    model = with_droppable_blocks(network(), StochasticDepthConfig(0.3))
    depth = StochasticDepth(droppable_blocks(model), SEED)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    traffic = Traffic()
    region = RegionDDP(
        model, dist.group.WORLD, traffic, compression=compression, deterministic=deterministic, skipped=depth.skipped
    )
    step = TrainStep(
        TrainConfig(device="cpu"),
        region,
        Replicas(LocalizedLearner(model, torch.zeros(1, 3, 2, 2), rule="frozen")),
        RegionOptimizer(model, OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-2)),
        world_size=world_size,
        device=CPU,
    )
    sent, dropped = [], []
    for number in range(len(STEPS)):
        batches = []
        for images, targets in micro_batches(number):
            mine = slice(rank, None, world_size)
            local_size = len(targets[mine])
            share = (images[mine], targets[mine]) if local_size else (images[:1], targets[:1])
            batches.append(Batch(*share, len(targets), local_size))
        dropped.append(depth.draw(number))
        with depth.step(number):
            step(batches, Tally(CPU))
        sent.append(traffic.take().gradient_bytes)
    return weights_of(model), sent, dropped


def train_plainly(dropped: list[list[bool]]) -> tuple[Weights, list[int]]:
    """The same in one process of plain torch on whole batches; bytes of the gradients that there were."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    used = []
    for number, pattern in enumerate(dropped):
        images, targets = (torch.cat(parts) for parts in zip(*micro_batches(number), strict=True))
        x = model[1](model[0](images))
        for block, is_dropped in zip(model[2 : 2 + BLOCKS], pattern, strict=True):
            x = x if is_dropped else x + block.conv(x)
        F.cross_entropy(model[-1](x.mean(dim=(2, 3))), targets).backward()
        used.append(sum(4 * p.numel() for p in model.parameters() if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model), used


@pytest.mark.parametrize(("compression", "deterministic"), [("none", False), ("none", True), ("bf16", False)])
def test_ranks_equal_one_process_and_skipped_gradients_stay_at_home(
    ranks: Any, compression: str, deterministic: bool
) -> None:
    results = ranks.run(train, compression, deterministic)
    dropped = results[0][2]
    assert all(pattern == dropped for _, _, pattern in results), "ranks must draw alike"
    assert 0 < sum(sum(pattern) for pattern in dropped) < BLOCKS * len(STEPS)
    assert_bit_equal([weights for weights, _, _ in results])

    expected, used = train_plainly(dropped)
    for weights, sent, _ in results:
        if compression == "none":
            assert_close(weights, expected, rtol=1e-4, atol=5e-6)
            assert sent == used
        else:
            assert [2 * num_bytes for num_bytes in sent] == used
            assert_close(weights, expected, rtol=0.1, atol=2e-3)
    assert len(set(used)) > 2
