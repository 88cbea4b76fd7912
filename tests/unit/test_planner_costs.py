"""Traffic, time and schedule of a plan against closed forms worked out by hand."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from locsgd_dist.config import parse_config
from locsgd_dist.data import DataConfig, DataShape
from locsgd_dist.distributed import ReplicaConfig
from locsgd_dist.localized import LocalizedConfig
from locsgd_dist.memory import BatchConfig
from locsgd_dist.planner import BoundaryStep, Machine, PlannedData, Planner, StepEstimator, planned_data
from locsgd_dist.planner.costs import all_reduce_seconds, broadcast_seconds, epoch_time, epoch_traffic, num_buckets
from locsgd_dist.planner.schedule import boundaries_per_epoch, planned_epochs

MIB = 1 << 20
WIDTH = 4


def configuration(*arguments: str) -> list[str]:
    return ["--model.name=vgg13", f"--model.width={WIDTH}", "--data.name=cifar10", *arguments]


#: Weights of VGG-13 at width 4, by hand: 3x3 convolutions, then the classifier.
CHANNELS = (3, 4, 4, 8, 8, 16, 16, 32, 32, 32, 32)
WEIGHTS = [9 * a * b for a, b in itertools.pairwise(CHANNELS)] + [32 * 10]
#: Each convolution has a bias and a norm of two vectors, the classifier a bias.
OWNED = [w + 3 * c for w, c in zip(WEIGHTS, CHANNELS[1:], strict=False)] + [32 * 10 + 10]
#: Side of each convolution's output; a pool halves it after every second one.
SIDES = (32, 32, 16, 16, 8, 8, 4, 4, 2, 2)
MACS = [w * side**2 for w, side in zip(WEIGHTS, SIDES, strict=False)] + [32 * 10]


@cache
def steps(*arguments: str) -> list[BoundaryStep]:
    estimator = StepEstimator(parse_config(configuration(*arguments)), DataShape(10, 32), world_size=2)
    return [estimator.move_to(boundary) for boundary in range(9)]


# --- bytes and multiply-adds ---------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_sgd_region() -> None:
    assert [step.gradient_bytes for step in steps()] == [4 * sum(OWNED[t:]) for t in range(9)]
    compressed = steps("--distributed.gradient_compression=bf16")
    assert [step.gradient_bytes for step in compressed] == [2 * sum(OWNED[t:]) for t in range(9)]


def test_replicas_are_the_weights_of_the_localized_region() -> None:
    assert [step.replica_bytes for step in steps()] == [4 * sum(WEIGHTS[:t]) for t in range(9)]
    assert {step.replica_bytes for step in steps("--localized.rule=frozen")} == {0}


def test_multiply_adds() -> None:
    """Forward once; backward twice but once in the transition layer; localized updates once on a share of the batch."""
    for t, step in enumerate(steps("--localized.batch_fraction=0.25")):
        macs = step.macs(1)
        assert macs.forward == sum(MACS)
        assert macs.backward == 2 * sum(MACS[t:]) - MACS[t]
        assert macs.localized == sum(MACS[:t]) / 4


def test_multiply_adds_of_rarer_and_dearer_updates() -> None:
    boundary = 4
    plain = steps("--localized.update_every=5")[boundary]
    assert plain.macs(1).localized == pytest.approx(sum(MACS[:boundary]) / 5)
    assert plain.macs(1).backward == steps()[boundary].macs(1).backward
    assert steps("--localized.rule=random")[boundary].macs(1).localized == 0
    oja = steps("--localized.rule=oja", "--batch.per_gpu=8")[boundary]
    # Outputs with outputs at each position, and their sum with the weight once for a batch.
    extra = 0.0
    for layer in oja.updated:
        channels, positions = layer.weight.shape[0], layer.macs // layer.weight.numel()
        extra += positions * channels**2 + channels * layer.weight.numel() / 8
    assert oja.macs(1).localized == pytest.approx(sum(MACS[:boundary]) + extra)


def test_ranks_share_localized_updates_when_sharded() -> None:
    """The busiest of two ranks has at least half and of many ranks the largest layer; in other modes each has all."""
    step, alone = steps()[6], steps("--replicas.mode=all_reduce")[6]
    assert sum(MACS[:6]) / 2 <= step.macs(2).localized <= sum(MACS[:6]) / 2 + max(MACS[:6])
    assert step.macs(4096).localized == max(MACS[:6])
    assert alone.macs(2).localized == sum(MACS[:6])


# --- traffic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "megabytes", "size", "buckets"),
    [
        (0, 1, None, 0),
        (1, 0.5, None, 1),
        (8, 0.5, None, 4),  # 4 MiB: buckets of 1
        (32, 0.5, None, 8),  # 16 MiB: of 2
        (100, 4, None, 15),  # 400 MiB: of 25, each closed by the 7th tensor of 4
        (25, 4, 4, 25),
        (25, 4, 25, 4),
        (4, 3, None, 4),  # none is smaller than a tensor
    ],
)
def test_buckets_of_the_regions_gradients(count: int, megabytes: float, size: int | None, buckets: int) -> None:
    assert num_buckets([int(megabytes * MIB)] * count, size) == buckets


def test_buckets_are_cut_by_what_they_hold_before_compression() -> None:
    plain, compressed = (
        epoch_traffic(
            steps("--model.width=64", f"--distributed.gradient_compression={how}")[4], 100, 2, ReplicaConfig()
        )
        for how in ("none", "bf16")
    )
    assert compressed.gradient_bytes * 2 == plain.gradient_bytes
    assert compressed.gradient_collectives == plain.gradient_collectives > 9


@pytest.mark.parametrize(
    ("mode", "exchanges"),
    [("sharded", 13), ("periodic", 13), ("all_reduce", 100)],  # 100 steps in windows of 8: 12 whole, one cut short
)
def test_an_epochs_traffic(mode: str, exchanges: int) -> None:
    step = steps()[4]
    traffic = epoch_traffic(step, 100, 2, ReplicaConfig(mode=mode, every=8))  # type: ignore[arg-type]
    assert traffic.gradient_bytes == 100 * 4 * sum(OWNED[4:])
    assert traffic.replica_bytes == exchanges * 4 * sum(WEIGHTS[:4])
    assert traffic.replica_exchanges == exchanges


def test_replicas_travel_only_after_updates() -> None:
    step = steps()[4]
    for mode, exchanges in (("sharded", 5), ("periodic", 5), ("all_reduce", 34)):  # 34 updates in 100 steps
        traffic = epoch_traffic(step, 100, 2, ReplicaConfig(mode=mode, every=8), LocalizedConfig(update_every=3))  # type: ignore[arg-type]
        assert (traffic.replica_exchanges, traffic.gradient_bytes) == (exchanges, 100 * 4 * sum(OWNED[4:]))


def test_refresh_steps_send_the_regions_gradients_and_no_updates() -> None:
    flags = ("--localized.refresh_every=4", "--localized.refresh_recompute=false")
    step = steps(*flags)[4]
    replicas = ReplicaConfig(mode="all_reduce")
    whole = epoch_traffic(step, 100, 2, replicas, LocalizedConfig(refresh_every=4))
    assert whole.gradient_bytes == 100 * 4 * sum(OWNED[4:]) + 25 * 4 * sum(OWNED[:4])
    assert whole.replica_exchanges == 75
    part = epoch_traffic(step, 100, 2, replicas, LocalizedConfig(refresh_every=4, refresh_fraction=0.5))
    assert (part.gradient_bytes, part.replica_exchanges) == (whole.gradient_bytes, 100)
    large = replace(step, refresh_parameter_bytes=(20 * MIB, 20 * MIB, 20 * MIB))  # a bucket of two, one of the third
    assert epoch_traffic(large, 100, 2, replicas, LocalizedConfig(refresh_every=4)).refresh_collectives == 25 * 2


def test_refresh_steps_take_time() -> None:
    """Such a step costs what plain SGD does, and one more forward pass of the region where it recomputes."""
    boundary = 4
    whole_backward = 2 * sum(MACS[:boundary]) - MACS[0] + MACS[boundary]
    for flags, expected in (
        (("--localized.refresh_every=4",), (whole_backward + sum(MACS[:boundary])) / 4),
        (("--localized.refresh_every=4", "--localized.refresh_recompute=false"), whole_backward / 4),
        (("--localized.refresh_every=1", "--localized.refresh_recompute=false"), whole_backward),
        (
            ("--localized.refresh_every=2", "--localized.refresh_recompute=false", "--localized.refresh_fraction=0.5"),
            whole_backward / 4,
        ),
    ):
        macs = steps(*flags)[boundary].macs(1)
        assert macs.refresh == pytest.approx(expected)
        assert (macs.forward, macs.backward) == (sum(MACS), 2 * sum(MACS[boundary:]) - MACS[boundary])
        share = 1 if "every=1" in flags[0] else 0.25
        assert macs.localized == pytest.approx((1 - share) * sum(MACS[:boundary]))
        assert steps(*flags)[0].macs(1).refresh == 0


def test_one_gpu_sends_nothing() -> None:
    traffic = epoch_traffic(steps()[4], 100, 1, ReplicaConfig())
    assert (traffic.gradient_bytes, traffic.gradient_collectives, traffic.replica_bytes) == (0, 0, 0)


# --- time ----------------------------------------------------------------------------------------------------------


def test_ring_all_reduce() -> None:
    """1 GB on four GPUs at 1 GB/s: 1.5 GB cross each link; 3 collectives of 6 messages of 1 ms."""
    machine = Machine(gpus=4, bytes_per_second=1e9, latency_seconds=1e-3)
    assert all_reduce_seconds(1e9, 3, machine) == pytest.approx(1.5 + 0.018)
    assert all_reduce_seconds(1e9, 3, Machine(gpus=1, bytes_per_second=1e9)) == 0


def test_pipelined_broadcast() -> None:
    machine = Machine(gpus=4, bytes_per_second=1e9, latency_seconds=1e-3)
    assert broadcast_seconds(1e9, 2, machine) == pytest.approx(1 + 0.006)
    assert broadcast_seconds(1e9, 2, Machine(gpus=1, bytes_per_second=1e9)) == 0


@pytest.mark.parametrize("bytes_per_second", [1e12, 1e5])
def test_an_epochs_time(bytes_per_second: float) -> None:
    """A fast link hides behind the backward pass, a slow one takes its place."""
    replicas = ReplicaConfig(mode="all_reduce")
    step = steps("--replicas.mode=all_reduce")[5]
    machine = Machine(2, flops_per_second=1e9, bytes_per_second=bytes_per_second, latency_seconds=0.0)
    traffic = epoch_traffic(step, 10, 2, replicas)
    seconds = epoch_time(step, traffic, num_train=1000, machine=machine, replicas=replicas)
    per_mac = 2 * 500 / 1e9
    exchange = 10 * 4 * (sum(OWNED[5:]) + sum(WEIGHTS[:5])) / bytes_per_second
    assert seconds.forward == pytest.approx(per_mac * sum(MACS))
    assert seconds.localized == pytest.approx(per_mac * sum(MACS[:5]))
    assert seconds.backward == pytest.approx(per_mac * (2 * sum(MACS[5:]) - MACS[5]))
    assert seconds.exchange == pytest.approx(exchange)
    hidden = exchange < seconds.backward
    assert hidden == (bytes_per_second == 1e12)
    beside = seconds.backward if hidden else exchange
    assert seconds.total == pytest.approx(seconds.forward + seconds.localized + beside)


def test_gradients_of_refresh_steps_hide_behind_nothing() -> None:
    flags = ("--localized.rule=frozen", "--localized.refresh_every=2")
    config = parse_config(configuration(*flags))
    step = steps(*flags)[5]
    machine = Machine(2, flops_per_second=1e9, bytes_per_second=1e9, latency_seconds=0.0)
    traffic = epoch_traffic(step, 10, 2, config.replicas, config.localized)
    seconds = epoch_time(
        step, traffic, num_train=1000, machine=machine, replicas=config.replicas, localized=config.localized
    )
    assert seconds.exchange == pytest.approx(10 * 4 * sum(OWNED[5:]) / 1e9)
    assert seconds.refresh_exchange == pytest.approx(5 * 4 * sum(OWNED[:5]) / 1e9)
    assert seconds.exchange < seconds.backward
    shown = seconds.forward + seconds.localized + seconds.backward + seconds.refresh_exchange
    assert seconds.total == pytest.approx(shown)


@pytest.mark.parametrize("bytes_per_second", [1e12, 1e4])
def test_gradients_of_refresh_steps_by_a_part_of_the_batch_hide_beside_the_rest(bytes_per_second: float) -> None:
    flags = ("--localized.rule=frozen", "--localized.refresh_every=1", "--localized.refresh_fraction=0.5")
    config = parse_config(configuration(*flags))
    step = steps(*flags)[5]
    machine = Machine(2, flops_per_second=1e9, bytes_per_second=bytes_per_second, latency_seconds=0.0)
    traffic = epoch_traffic(step, 10, 2, config.replicas, config.localized)
    seconds = epoch_time(
        step, traffic, num_train=1000, machine=machine, replicas=config.replicas, localized=config.localized
    )
    assert seconds.exchange == pytest.approx(10 * 4 * sum(OWNED) / bytes_per_second)
    beside = seconds.backward if bytes_per_second == 1e12 else seconds.exchange
    assert seconds.total == pytest.approx(seconds.forward + seconds.localized + beside)


# --- schedule ------------------------------------------------------------------------------------------------------


def trace(*arguments: str, path: Path | None = None, pace: str | None = None) -> list[int]:
    config = parse_config(configuration("--train.epochs=10", *arguments))
    layers = StepEstimator(config, DataShape(10, 32), world_size=1).layers
    return boundaries_per_epoch(config, layers, pace, path)  # type: ignore[arg-type]


def test_the_dynamic_pace_fires_at_every_chance() -> None:
    """11 layers, L_max .75, t_shift 2: K = floor(10 * 2 / 8.25) = 2; the boundary stops at floor(8.25)."""
    assert trace("--selection.tshift=2") == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


def test_the_static_pace_is_quadratic() -> None:
    """T = floor(8.25 - 8.25 (E - 10)^2 / 81), epochs E from 1."""
    assert trace(pace="static") == [max(0, int(8.25 - 8.25 * (e - 10) ** 2 / 81)) for e in range(1, 11)]


def test_a_recorded_trace_and_plain_sgd(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([0, 3, 5]))
    assert trace(path=path) == [0, 3, 5, 5, 5, 5, 5, 5, 5, 5]
    assert trace("--localized.rule=none") == [0] * 10


def halving(memory: int | None = None, **batch: int) -> list[tuple[int, int]]:
    """Epochs with another batch, where the footprint is the batch times what is left of ten layers."""
    planned = planned_epochs(
        [0, 0, 2, 4, 5, 6, 7, 8],
        lambda boundary, per_gpu: per_gpu * (10 - boundary),
        BatchConfig(per_gpu=8, policy="halving", **{"min_steps": 1, **batch}),  # type: ignore[arg-type]
        interval=1,
        num_train=10_000,
        batches_per_step=4,
        memory_bytes=memory,
    )
    assert all(epoch.footprint == epoch.per_gpu * (10 - epoch.boundary) for epoch in planned)
    return [(b.epoch, b.per_gpu) for a, b in itertools.pairwise(planned) if a.per_gpu != b.per_gpu]


def test_the_batch_doubles_with_the_boundary_that_halves_the_footprint() -> None:
    """80 at first: 40 at boundary 5, in force from epoch 4; then 16 images, 80 again, halved at boundary 8: not 7.5."""
    assert halving() == [(4, 16), (7, 32)]


def test_what_keeps_the_batch_from_doubling() -> None:
    assert halving(memory=79) == []  # the trial of 16 images needs 80
    assert halving(max_per_gpu=16) == [(4, 16)]
    assert halving(min_steps=100) == [(4, 16)]  # 10,000 images in steps of 128: 79
    assert halving(interval_epochs=4) == [(4, 16)]  # the next change is due after epoch 7


# --- the whole ------------------------------------------------------------------------------------------------------


@cache
def planner(gpus: int = 4) -> Planner:
    config = parse_config(configuration("--train.epochs=12", "--batch.per_gpu=32"))
    machine = Machine(gpus, 1e11, 1e9, 1e-6, 20 * MIB)
    return Planner(config, planned_data(config.data), machine)


def test_a_plan_adds_up() -> None:
    plan = planner().to_json()
    assert [b["boundary"] for b in plan["boundaries"]] == list(range(9))
    parts = ("parameters", "gradients", "optimizer_state", "activations", "temporary")
    for b in plan["boundaries"]:
        assert b["footprint_bytes"] == sum(b[f"{part}_bytes"] for part in parts)
        assert b["grad_all_reduce_bytes"] == 4 * sum(OWNED[b["boundary"] :])
    epochs = plan["schedule"]["epochs"]
    assert len(epochs) == 12
    for epoch in epochs:
        steps = -(-50_000 // (4 * epoch["per_gpu_batch"]))
        assert epoch["num_steps"] == steps
        assert epoch["grad_all_reduce_bytes"] == steps * 4 * sum(OWNED[epoch["boundary"] :])
        assert epoch["plain_ddp_bytes"] == -(-50_000 // 128) * 4 * sum(OWNED)
    changed = [b["epoch"] for a, b in itertools.pairwise(epochs) if a["per_gpu_batch"] != b["per_gpu_batch"]]
    assert [change["epoch"] for change in plan["schedule"]["batch_changes"]] == changed != []
    json.dumps(plan)


def test_largest_batches_fit() -> None:
    for record, step in zip(planner().to_json()["boundaries"], planner().steps, strict=True):
        batch = record["largest_batch"]
        assert step.memory.at(batch).total <= 20 * MIB < step.memory.at(batch + 1).total


def test_scaling_starts_at_one_gpu_and_ends_at_all() -> None:
    points = planner().scaling()
    assert [p.gpus for p in points] == [1, 2, 4]
    assert (points[0].efficiency, points[0].plain_efficiency) == (1, 1)
    assert points[-1].seconds == pytest.approx(sum(e["seconds"] for e in planner().to_json()["schedule"]["epochs"]))


def test_gpus_that_are_no_power_of_two() -> None:
    assert [p.gpus for p in planner(6).scaling()] == [1, 2, 4, 6]


# --- what the data is ----------------------------------------------------------------------------------------------


def test_known_sets_need_no_files() -> None:
    digits = planned_data(DataConfig(name="digits", root="nowhere"))
    assert (digits.shape, digits.num_train) == (DataShape(10, 32), 1437)
    cifar = planned_data(DataConfig(name="cifar100", root="nowhere", train_samples=5000))
    assert (cifar.shape, cifar.num_train) == (DataShape(100, 32), 5000)
    assert cifar.assumption == ""


def test_an_image_folder_is_imagenet_unless_told() -> None:
    assert planned_data(DataConfig(name="imagefolder")) == PlannedData(
        DataShape(1000, 224),
        1_281_167,
        "data.name=imagefolder is taken for ImageNet: 1000 classes (--num-classes), "
        "1,281,167 training images (--num-train).",
    )
    told = planned_data(DataConfig(name="imagefolder", image_size=64), num_classes=10, num_train=500)
    assert told == PlannedData(DataShape(10, 64), 500)


def test_the_digits_are_as_many_as_planned() -> None:
    from locsgd_dist.data.sources import open_source

    assert len(open_source(DataConfig(name="digits")).train) == planned_data(DataConfig(name="digits")).num_train
