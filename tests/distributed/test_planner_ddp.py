"""The foretold footprint of a rank under DDP against exact bytes of a step on two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from locsgd_dist.config import Config, parse_config
from locsgd_dist.data import Batch, DataShape
from locsgd_dist.distributed import Refresh, RegionDDP, Traffic, make_replicas
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.memory import FootprintMonitor, MonitorConfig
from locsgd_dist.models import build_model
from locsgd_dist.optimization import RegionOptimizer
from locsgd_dist.planner import StepEstimator
from locsgd_dist.planner.costs import epoch_traffic
from locsgd_dist.step import Tally, TrainStep

CPU = torch.device("cpu")
PER_GPU, STEPS = 8, 5


def train(config: Config, boundary: int) -> tuple[int, int, int, int]:
    """(largest footprint, gradient bytes, replica bytes, gradient collectives) of all steps on this rank.

    Momentum begins in the first two steps, which the footprint leaves out; DDP cuts its buckets anew after the first,
    whose collectives are left out.
    """
    torch.manual_seed(0)
    model = build_model(config.model, 10).train()
    learner = LocalizedLearner(model, torch.zeros(1, 3, 32, 32), rule=config.localized.rule)
    traffic, group = Traffic(), dist.group.WORLD
    region = RegionDDP(model, group, traffic, bucket_mib=config.distributed.bucket_mib)
    replicas = make_replicas(config.replicas, learner, group, traffic)
    refresh = Refresh(learner, group, traffic, config.localized)
    optimizer = RegionOptimizer(model, config.optim, keeps_released=refresh.enabled)
    step = TrainStep(config.train, region, replicas, optimizer, refresh=refresh, world_size=2, device=CPU)
    optimizer.release(learner.advance(boundary))
    region.refresh()
    replicas.refresh()
    batch = Batch(torch.randn(PER_GPU, 3, 32, 32), torch.arange(PER_GPU) % 10, 2 * PER_GPU, PER_GPU)
    batches = [batch] * config.train.gradient_accumulation
    tally = Tally(CPU)
    footprints: list[int] = []
    collectives_of_first = 0
    for index in range(STEPS):
        with FootprintMonitor(MonitorConfig(trace_hz=0), CPU) as monitor:
            with monitor.measured_step(model, optimizer.optimizer):
                step(batches, tally)
            footprints.append(monitor.footprint().bytes)
        if index == 0:
            collectives_of_first = traffic.gradient_collectives
    replicas.synchronise()
    later_collectives = traffic.gradient_collectives - collectives_of_first
    return max(footprints[2:]), traffic.gradient_bytes, traffic.replica_bytes, later_collectives


@pytest.mark.parametrize("boundary", [0, 9, 15])
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--replicas.mode=all_reduce",),
        ("--replicas.mode=periodic",),
        ("--train.gradient_accumulation=2",),
        ("--localized.refresh_every=2",),
        ("--localized.refresh_every=2", "--localized.refresh_recompute=false", "--localized.rule=frozen"),
        (
            "--localized.rule=frozen",
            "--localized.refresh_every=1",
            "--localized.refresh_fraction=0.25",
            "--localized.refresh_recompute=false",
        ),
        ("--model.width=48",),
        ("--model.width=48", "--distributed.bucket_mib=8"),
    ],
)
def test_a_rank_under_ddp(two_ranks: Any, arguments: tuple[str, ...], boundary: int) -> None:
    config = parse_config(["--model.width=16", f"--batch.per_gpu={PER_GPU}", f"--replicas.every={STEPS}", *arguments])
    ranks = two_ranks.run(train, config, boundary)
    step = StepEstimator(config, DataShape(10, 32), world_size=2, rounding=1).move_to(boundary)
    assert step.memory.at(PER_GPU).total == max(footprint for footprint, *_ in ranks)
    traffic, later = (
        epoch_traffic(step, steps, 2, config.replicas, config.localized, config.distributed.bucket_mib)
        for steps in (STEPS, STEPS - 1)
    )
    for _, gradients, replicas, collectives in ranks:
        assert (traffic.gradient_bytes, traffic.replica_bytes) == (gradients, replicas)
        assert later.gradient_collectives == collectives
