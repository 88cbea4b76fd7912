"""RegionDDP: gradients of the SGD region alone travel, and nothing of an old wrapper stays."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import (
    LAYERS,
    PlainNet,
    PlainTraining,
    Weights,
    assert_bit_equal,
    assert_close,
    gradients_of,
    samples,
    weights_of,
)
from torch import nn
from torch.distributed import distributed_c10d
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from locsgd_dist.distributed import RegionDDP, Traffic

STEPS = 5
GLOBAL_BATCH = 16


def wide_net(seed: int = 0) -> nn.Sequential:
    """Enough parameters (2 MB) that DDP needs several buckets, whose layout it changes after the first step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = (64, 600, 500, 300, 5)
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[m for linear in linears for m in (linear, nn.Tanh())][:-1])


def shard(step: int, count: int = GLOBAL_BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = samples(count, seed=step)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return images[rank::world_size], targets[rank::world_size]


# --- gradients and training ---------------------------------------------------------------------------------------


def train_on_shards(boundary: int, compression: str = "none") -> tuple[Weights, Weights]:
    """Gradients of the first step and weights after the last."""
    model = PlainNet()
    model.freeze(boundary)
    region = RegionDDP(model, dist.group.WORLD, compression=compression)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05, momentum=0.9, weight_decay=1e-2)
    first: Weights = {}
    for step in range(STEPS):
        images, targets = shard(step)
        F.cross_entropy(region(images), targets).backward()
        first = first or gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
    return first, weights_of(model)


@pytest.mark.parametrize("boundary", [0, 1, 3, 4])
def test_training_equals_one_process_on_the_whole_batch(ranks: Any, boundary: int) -> None:
    results = ranks.run(train_on_shards, boundary)

    model = PlainNet()
    model.freeze(boundary)
    F.cross_entropy(model(samples(GLOBAL_BATCH, 0)[0]), samples(GLOBAL_BATCH, 0)[1]).backward()
    for first, _ in results:
        assert_close(first, gradients_of(model))

    plain = PlainTraining(PlainNet(), local_lr=0.0)
    plain.shift(boundary)
    for step in range(STEPS):
        plain.step(*samples(GLOBAL_BATCH, step))
    for _, weights in results:
        assert_close(weights, weights_of(plain.model))
    assert_bit_equal([weights for _, weights in results])


def accumulate_across_a_shift() -> tuple[Weights, list[int]]:
    """Weights after the last step, and the bytes that each step has sent."""
    model = PlainNet()
    traffic = Traffic()
    sent = []
    region = RegionDDP(model, dist.group.WORLD, traffic)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for step, boundary in enumerate((0, 0, 2, 2)):
        if step == 2:
            model.freeze(boundary)
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter)
            region.refresh()
        images, targets = shard(step, 4 * GLOBAL_BATCH)
        micro = list(zip(images.chunk(4), targets.chunk(4), strict=True))
        for x, y in micro[:-1]:
            with region.no_sync():
                (F.cross_entropy(region(x), y) / 4).backward()
        (F.cross_entropy(region(micro[-1][0]), micro[-1][1]) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent.append(traffic.take().gradient_bytes)
    return weights_of(model), sent


def test_four_micro_batches_across_a_shift_equal_one_large_batch(two_ranks: Any) -> None:
    results = two_ranks.run(accumulate_across_a_shift)

    plain = PlainTraining(PlainNet(), local_lr=0.0)
    once = []
    for step, boundary in enumerate((0, 0, 2, 2)):
        plain.shift(boundary)
        plain.step(*samples(4 * GLOBAL_BATCH, step))
        once.append(sum(4 * p.numel() for p in plain.model.parameters() if p.requires_grad))
    for weights, sent in results:
        assert_close(weights, weights_of(plain.model))
        assert sent == once, "a micro-batch before the last one has sent its gradients"
    assert_bit_equal([weights for weights, _ in results])


def test_bf16_gradients_are_within_their_rounding(ranks: Any) -> None:
    world_size = ranks.world_size
    results = ranks.run(train_on_shards, 1, "bf16")

    images, targets = samples(GLOBAL_BATCH, 0)
    per_rank = []
    for rank in range(world_size):
        model = PlainNet()
        model.freeze(1)
        F.cross_entropy(model(images[rank::world_size]), targets[rank::world_size]).backward()
        per_rank.append(gradients_of(model))
    for first, _ in results:
        for name, gradient in first.items():
            exact = np.mean([g[name] for g in per_rank], axis=0)
            # Each rank rounds once, and every addition again, by at most half a unit in the last of 8 places.
            bound = (1 + world_size) * 2.0**-9 * np.mean([np.abs(g[name]) for g in per_rank], axis=0)
            assert (np.abs(gradient - exact) <= bound + 1e-7).all(), name
            assert np.array_equal(torch.from_numpy(gradient).bfloat16().float().numpy(), gradient), name
    assert_bit_equal([weights for _, weights in results])


# --- bytes --------------------------------------------------------------------------------------------------------


def counted_bytes(compression: str) -> list[tuple[int, int, int, int]]:
    """For each boundary and step: boundary, parameter bytes of the SGD region, bytes counted, collectives counted."""
    model = wide_net()
    linears = [m for m in model if isinstance(m, nn.Linear)]
    traffic = Traffic()
    region = RegionDDP(model, dist.group.WORLD, traffic, compression=compression)
    counted = []
    for boundary in range(len(linears) + 1):
        for linear in linears[:boundary]:
            linear.requires_grad_(False)
        region.refresh()
        assert region.is_wrapped == (boundary < len(linears))
        expected = sum(4 * (m.weight.numel() + m.bias.numel()) for m in linears[boundary:])
        for step in range(3):
            loss = F.cross_entropy(region(shard(step)[0].flatten(1)[:, :64]), shard(step)[1])
            if loss.requires_grad:
                loss.backward()
            taken = traffic.take()
            assert taken.replica_bytes == taken.replica_collectives == 0
            counted.append((boundary, expected, taken.gradient_bytes, taken.gradient_collectives))
            model.zero_grad()
    return counted


@pytest.mark.parametrize(("compression", "divisor"), [("none", 1), ("bf16", 2)])
def test_bytes_per_step_are_those_of_the_sgd_region(two_ranks: Any, compression: str, divisor: int) -> None:
    for counted in two_ranks.run(counted_bytes, compression):
        for boundary, expected, num_bytes, collectives in counted:
            assert num_bytes * divisor == expected, f"boundary {boundary}"
            assert (collectives > 0) == (expected > 0)
        assert max(collectives for *_, collectives in counted) > 1, "one bucket only: the test covers too little"
        assert counted[-1][1] == 0


def buckets_of(num_layers: list[int], size: int | None) -> list[int]:
    """All-reduces of a settled step, for each number of layers in the SGD region, half a MiB each."""
    model = nn.Sequential(*[nn.Linear(362, 362) for _ in range(max(num_layers))])
    traffic = Traffic()
    region = RegionDDP(model, dist.group.WORLD, traffic, bucket_mib=size)
    counted = []
    for count in num_layers:
        for layer in model[: len(model) - count]:
            layer.requires_grad_(False)
        region.refresh()
        for _ in range(2):
            traffic.take()
            region(torch.ones(1, 362)).sum().backward()
        counted.append(traffic.take().gradient_collectives)
    return counted


@pytest.mark.parametrize(("size", "expected"), [(None, [10, 8, 4, 1]), (4, [5, 2, 1, 1]), (25, [1, 1, 1, 1])])
def test_buckets_follow_the_regions_size(two_ranks: Any, size: int | None, expected: list[int]) -> None:
    """20 MiB in buckets of 2, 8 MiB and 4 MiB of 1: an eighth at most, as long as it is no less than 1 MiB."""
    assert two_ranks.run(buckets_of, [40, 16, 8, 1], size) == [expected] * 2


# --- what wrapping does to weights --------------------------------------------------------------------------------


def initial_weights(boundary: int) -> list[Weights]:
    """This rank's own weights, those after construction, those moved apart, and those after a refresh."""
    model = PlainNet(seed=dist.get_rank())
    model.register_buffer("shift", torch.full((3,), float(dist.get_rank())))
    model.freeze(boundary)
    states = [weights_of(model)]
    region = RegionDDP(model, dist.group.WORLD)
    states.append(weights_of(model))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += dist.get_rank() + 1
    states.append(weights_of(model))
    region.refresh()
    states.append(weights_of(model))
    return states


@pytest.mark.parametrize("boundary", [0, 2, len(LAYERS)])
def test_rank_0_wins_at_construction_and_never_again(two_ranks: Any, boundary: int) -> None:
    results = two_ranks.run(initial_weights, boundary)
    own, constructed, apart, refreshed = zip(*results, strict=True)
    assert not np.array_equal(own[0]["conv1.weight"], own[1]["conv1.weight"])
    assert_bit_equal([own[0], *constructed])
    for before, after in zip(apart, refreshed, strict=True):
        assert_bit_equal([before, after])
    assert not np.array_equal(refreshed[0]["conv1.weight"], refreshed[1]["conv1.weight"])


# --- nothing stays behind -----------------------------------------------------------------------------------------


def refresh_often(count: int) -> dict[str, Any]:
    # Each refresh collects garbage: pass over the million objects of imported modules. The first wrapper imports most.
    RegionDDP(PlainNet(), dist.group.WORLD)
    gc.collect()
    gc.freeze()
    try:
        return _refresh_often(count)
    finally:
        gc.unfreeze()


def _refresh_often(count: int) -> dict[str, Any]:
    model = PlainNet()
    traffic = Traffic()
    region = RegionDDP(model, dist.group.WORLD, traffic)
    images, targets = shard(0)
    buckets: list[StorageWeakRef] = []
    bytes_wrong = 0

    def refresh_and_step(boundary: int) -> None:
        nonlocal bytes_wrong
        model.freeze(boundary)
        region.refresh()
        for _ in range(2):
            loss = F.cross_entropy(region(images), targets)
            if loss.requires_grad:
                loss.backward()
        # A hook that a wrapper before this one left behind would count, or fail, here.
        bytes_wrong += traffic.take().gradient_bytes != 2 * sum(
            4 * p.numel() for p in model.parameters() if p.requires_grad
        )
        buckets.extend(StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters() if p.grad is not None)

    def resources() -> dict[str, int]:
        gc.collect()
        modules, parameters = list(model.modules()), list(model.parameters())
        return {
            "wrappers": sum(type(o) is DistributedDataParallel for o in gc.get_objects()),
            "process groups": len(distributed_c10d._world.pg_map),
            "groups ever made": distributed_c10d._world.group_count,
            "file descriptors": len(os.listdir("/proc/self/fd")),
            "parameter hooks": sum(
                len(p._backward_hooks or ()) + len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
                for p in parameters
            ),
            "module hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        }

    for boundary in range(len(LAYERS) + 1):
        refresh_and_step(boundary)
    refresh_and_step(2)
    before = resources()
    for index in range(count):
        refresh_and_step(index % (len(LAYERS) + 1))
    refresh_and_step(0)
    stale = len(buckets)
    # Gradients of the layers that leave now are views into the buckets that are to go.
    refresh_and_step(2)
    after = resources()
    return {
        "before": before,
        "after": after,
        "bytes_wrong": bytes_wrong,
        "stale_buckets": sum(not bucket.expired() for bucket in buckets[:stale]),
        "live_buckets": sum(not bucket.expired() for bucket in buckets[stale:]),
    }


def test_fifty_refreshes_leave_nothing_behind(two_ranks: Any) -> None:
    for seen in two_ranks.run(refresh_often, 50):
        assert seen["after"] == seen["before"]
        assert seen["after"]["wrappers"] == 1
        assert seen["after"]["parameter hooks"] == seen["after"]["module hooks"] == 0
        assert seen["bytes_wrong"] == 0
        assert seen["stale_buckets"] == 0
        assert seen["live_buckets"] > 0, "no bucket seen alive: the count of stale ones shows nothing"


def drop_region(deterministic: bool) -> list[bool]:
    model = PlainNet()
    region = RegionDDP(model, dist.group.WORLD, deterministic=deterministic)
    F.cross_entropy(region(shard(0)[0]), shard(0)[1]).backward()
    alive = [weakref.ref(model), weakref.ref(region), weakref.ref(region._ddp)]
    del model, region
    gc.collect()
    return [reference() is not None for reference in alive]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_dropped_region_is_freed(two_ranks: Any, deterministic: bool) -> None:
    assert two_ranks.run(drop_region, deterministic) == [[False] * 3] * 2


# --- deterministic ------------------------------------------------------------------------------------------------


def gradients_of_old_and_new_wrapper(boundary: int) -> list[Weights]:
    """Of one batch at fixed weights: at the first steps of a wrapper, at its later ones, and of a fresh one."""
    model = wide_net()
    for linear in [m for m in model if isinstance(m, nn.Linear)][:boundary]:
        linear.requires_grad_(False)
    region = RegionDDP(model, dist.group.WORLD, deterministic=True)
    images, targets = shard(0)
    seen = []
    for step in range(6):
        if step == 4:
            region.refresh()
        F.cross_entropy(region(images.flatten(1)[:, :64]), targets).backward()
        seen.append(gradients_of(model))
        model.zero_grad()
    return seen


@pytest.mark.parametrize("boundary", [0, 1])
def test_deterministic_gradients_do_not_depend_on_the_age_of_the_wrapper(four_ranks: Any, boundary: int) -> None:
    results = four_ranks.run(gradients_of_old_and_new_wrapper, boundary)
    assert_bit_equal([gradients for seen in results for gradients in seen])
