"""The foretold footprint against exact bytes of real steps on the CPU, at the planned batch and at others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locsgd_dist.config import Config, parse_config
from locsgd_dist.data import Batch, DataShape
from locsgd_dist.distributed import Refresh, RegionDDP, Replicas
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.memory import FootprintMonitor, MonitorConfig
from locsgd_dist.memory.tensor_bytes import saved_activation_bytes
from locsgd_dist.models import build_model
from locsgd_dist.optimization import RegionOptimizer
from locsgd_dist.planner import BoundaryStep, StepEstimator
from locsgd_dist.step import Tally, TrainStep

CPU = torch.device("cpu")
CLASSES = 10
NETWORKS = {
    "resnet18": (("--model.name=resnet18", "--model.width=16"), 32, (0, 9, 15)),
    "vgg13": (("--model.name=vgg13", "--model.width=16"), 32, (0, 5, 8)),
    "resnet34": (("--model.name=resnet34",), 32, (0, 13, 27)),
    "resnet50": (("--model.name=resnet50",), 32, (0, 15, 40)),
    "mobilenet_v2": (("--model.name=mobilenet_v2",), 32, (0, 20, 39)),
}


def configuration(*arguments: str, per_gpu: int = 4) -> Config:
    return parse_config(["--model.width=null", *arguments, f"--batch.per_gpu={per_gpu}", "--localized.rule=hebbian"])


class Measured:
    """A real network, trained on the CPU by the trainer's step, whose tensor bytes are counted."""

    def __init__(self, config: Config, side: int) -> None:
        self.config, self.side = config, side
        self.model = build_model(config.model, CLASSES).train()
        self.learner = LocalizedLearner(self.model, torch.zeros(1, 3, side, side), rule=config.localized.rule)
        region, replicas = RegionDDP(self.model, None), Replicas(self.learner)
        refresh = Refresh(self.learner, None, region.traffic, config.localized)
        self.optimizer = RegionOptimizer(self.model, config.optim, keeps_released=refresh.enabled)
        self.step = TrainStep(config.train, region, replicas, self.optimizer, refresh=refresh, world_size=1, device=CPU)

    def at(self, boundary: int, per_gpu: int) -> int:
        """The largest footprint of steps with that boundary after the first, with which momentum begins."""
        self.optimizer.release(self.learner.advance(boundary))
        batch = Batch(torch.randn(per_gpu, 3, self.side, self.side), torch.arange(per_gpu) % CLASSES, per_gpu, per_gpu)
        batches = [batch] * self.config.train.gradient_accumulation
        tally = Tally(CPU)
        self.step(batches, tally)
        footprints: list[int] = []
        for _ in range(max(1, self.config.localized.refresh_every)):
            with FootprintMonitor(MonitorConfig(trace_hz=0), CPU) as monitor:
                with monitor.measured_step(self.model, self.optimizer.optimizer):
                    self.step(batches, tally)
                footprint = monitor.footprint()
            assert footprint.source == "tensor_bytes"
            footprints.append(footprint.bytes)
        return max(footprints)

    def tried(self, boundary: int, per_gpu: int) -> int:
        """The footprint of a trial step."""
        self.at(boundary, per_gpu)  # with momentum
        with FootprintMonitor(MonitorConfig(trace_hz=0), CPU) as monitor:
            with monitor.measured_step(self.model, self.optimizer.optimizer):
                self.step.trial(per_gpu, (3, self.side, self.side), CLASSES)
            return monitor.footprint().bytes


def foretold(config: Config, side: int, boundaries: Sequence[int], world_size: int = 1) -> list[BoundaryStep]:
    estimator = StepEstimator(config, DataShape(CLASSES, side), world_size=world_size, rounding=1)
    return [estimator.move_to(boundary) for boundary in boundaries]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("refresh_every", [0, 2])
def test_a_trial_step_needs_what_a_real_one_needs(accumulation: int, refresh_every: int) -> None:
    flags = [f"--train.gradient_accumulation={accumulation}", f"--localized.refresh_every={refresh_every}"]
    measured = Measured(configuration("--model.name=resnet18", "--model.width=16", *flags), side=32)
    for boundary in (0, 9):
        real = measured.at(boundary, per_gpu=16)
        # But for the real one's sums of loss and correct answers.
        assert real - 64 <= measured.tried(boundary, per_gpu=16) <= 1.01 * real


@pytest.mark.parametrize("name", NETWORKS)
def test_the_papers_networks_equal_real_steps_to_the_byte(name: str) -> None:
    arguments, side, boundaries = NETWORKS[name]
    config = configuration(*arguments)
    measured = Measured(config, side)
    for step in foretold(config, side, boundaries):
        assert step.memory.at(4).total == measured.at(step.boundary, 4), step.boundary


@pytest.mark.parametrize(
    "arguments",
    [
        ("--optim.name=adamw",),
        ("--train.gradient_accumulation=3",),
        ("--localized.rule=frozen",),
        ("--localized.rule=random",),
        ("--localized.refresh_every=3",),
        ("--localized.refresh_every=2", "--localized.refresh_recompute=false"),
        ("--localized.refresh_every=1", "--localized.refresh_fraction=0.25", "--localized.refresh_recompute=false"),
        ("--localized.refresh_every=2", "--localized.refresh_fraction=0.5", "--localized.rule=frozen"),
        ("--localized.refresh_every=3", "--train.gradient_accumulation=2", "--localized.refresh_gain=2"),
        ("--model.name=vgg13", "--localized.refresh_every=2"),
        ("--train.precision=bf16",),
        ("--train.precision=bf16", "--localized.refresh_every=2"),
        ("--model.name=torchvision:shufflenet_v2_x0_5",),
        ("--model.name=planner_networks:small_densenet",),
    ],
    ids=lambda arguments: " ".join(argument.split(".", 1)[1] for argument in arguments),
)
def test_other_steps_equal_real_ones_to_the_byte(arguments: tuple[str, ...]) -> None:
    small = ["--model.width=8"] if "model.name" not in arguments[0] else ["--model.width=null"]
    config = parse_config([*small, "--batch.per_gpu=8", *arguments])
    measured = Measured(config, 32)
    for step in foretold(config, 32, (0, 9)):
        assert step.memory.at(8).total == measured.at(step.boundary, 8), step.boundary


@functools.cache
def small_steps() -> list[BoundaryStep]:
    return foretold(configuration("--model.name=resnet18", "--model.width=4"), 32, (0, 8, 15))


@pytest.mark.parametrize("per_gpu", [1, 3, 100])
def test_any_batch_follows_from_two(per_gpu: int) -> None:
    """Not the peak but every tensor is affine in the batch; a direct estimate at another batch must agree exactly."""
    direct = foretold(configuration("--model.name=resnet18", "--model.width=4", per_gpu=per_gpu), 32, (0, 8, 15))
    assert [step.memory.at(per_gpu) for step in small_steps()] == [step.memory.at(per_gpu) for step in direct]


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config = configuration("--model.name=resnet18", "--model.width=4")
    measured = Measured(config, 32)
    memory = 2_500_000
    for step in small_steps():
        largest = step.memory.largest_batch(memory)
        assert measured.at(step.boundary, largest) <= memory < measured.at(step.boundary, largest + 1)


def test_too_little_memory_for_one_image() -> None:
    step = small_steps()[0]
    assert step.memory.largest_batch(step.memory.at(1).total) == 1
    assert step.memory.largest_batch(step.memory.at(1).total - 1) == 0


def _loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(images), targets)


def test_the_parts() -> None:
    """At the start of the backward pass: parameters, momentum and saved activations are known from elsewhere."""
    config = configuration("--model.name=vgg13", "--model.width=8", per_gpu=64)
    for step in foretold(config, 32, (0, 4)):
        model = build_model(config.model, CLASSES).train()
        learner = LocalizedLearner(model, torch.zeros(1, 3, 32, 32), rule="frozen")
        learner.advance(step.boundary)
        parts = step.memory.at(64)
        held = [*model.parameters(), *model.buffers()]
        assert parts.parameters == sum(tensor.nbytes for tensor in held)
        assert parts.optimizer_state == sum(p.nbytes for p in model.parameters() if p.requires_grad)
        images, targets = torch.randn(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64)
        forward = functools.partial(_loss, model, images, targets)
        saved = saved_activation_bytes(forward, excluded=held)
        assert 0.85 * saved < parts.activations <= saved
        assert parts.total == sum(asdict(parts).values())


def test_ddp_adds_its_buckets() -> None:
    config = configuration("--model.name=resnet18", "--model.width=8", "--localized.rule=frozen", per_gpu=64)
    alone, ranked = foretold(config, 32, (0, 10)), foretold(config, 32, (0, 10), world_size=2)
    for one, many in zip(alone, ranked, strict=True):
        a, b = one.memory.at(64), many.memory.at(64)
        assert b.gradients == many.gradient_bytes > a.gradients
        assert b.total - a.total == pytest.approx(many.gradient_bytes - a.gradients, rel=0.05)


@pytest.mark.parametrize(("boundary", "gib"), [(0, 5.37), (15, 2.50)])
def test_resnet50_at_batch_64_as_published(boundary: int, gib: float) -> None:
    """fp32 SGD with momentum at 224x224; half of the first footprint is reached at layer 15, not before."""
    config = parse_config(["--config", "imagenet/resnet50"])
    estimator = StepEstimator(config, DataShape(1000, 224), world_size=1)
    assert estimator.move_to(boundary).memory.at(64).total / 2**30 == pytest.approx(gib, abs=0.005)


def test_resnet50_halves_at_layer_15() -> None:
    estimator = StepEstimator(parse_config(["--config", "imagenet/resnet50"]), DataShape(1000, 224), world_size=1)
    first, before, halved = (estimator.move_to(boundary).memory.at(64).total for boundary in (0, 14, 15))
    assert halved <= first / 2 < before


def test_channels_last_and_a_moving_average() -> None:
    plain, changed = (
        foretold(configuration("--model.name=resnet18", "--model.width=4", *extra), 32, (0, 5))
        for extra in ((), ("--train.channels_last=true", "--optim.ema_decay=0.9"))
    )
    for a, b in zip(plain, changed, strict=True):
        before, after = a.memory.at(4), b.memory.at(4)
        assert after.parameters == 2 * before.parameters + 8  # and its counter of updates
        assert after.activations == before.activations


def test_a_network_that_needs_values_is_refused_in_one_line() -> None:
    config = configuration("--model.name=planner_networks:branching")
    with pytest.raises(ValueError, match=r"model\.name planner_networks:branching cannot be planned: "):
        StepEstimator(config, DataShape(CLASSES, 32), world_size=1)
