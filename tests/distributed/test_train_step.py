"""TrainStep: every sample of a step weighs the same, however the ranks share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import (
    CLASSES,
    LAYERS,
    NormNet,
    PlainNet,
    PlainTraining,
    Weights,
    assert_bit_equal,
    assert_close,
    samples,
    weights_of,
)
from torch import Tensor, nn

from locsgd_dist.data import Batch
from locsgd_dist.distributed import RegionDDP, ReplicaConfig, Traffic, make_replicas
from locsgd_dist.distributed.replicas import assign_owners
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.step import Tally, TrainConfig, TrainStep
from locsgd_dist.validation import evaluate

LOCAL_LR = 0.02
CPU = torch.device("cpu")


def share(images: Tensor, targets: Tensor, rank: int, world_size: int) -> Batch:
    """A rank's interleaved share of a global batch; one filler sample where none is left for it."""
    mine = slice(rank, None, world_size)
    local_size = len(targets[mine])
    if local_size == 0:
        return Batch(images[:1], targets[:1], len(targets), 0)
    return Batch(images[mine], targets[mine], len(targets), local_size)


def global_batch(count: int, seed: int, soft: bool = False) -> tuple[Tensor, Tensor]:
    images, targets = samples(count, seed)
    if not soft:
        return images, targets
    generator = torch.Generator().manual_seed(seed)
    return images, torch.rand(count, CLASSES, generator=generator).softmax(dim=1)


class Training:
    def __init__(
        self,
        mode: str,
        every: int = 1,
        *,
        model: nn.Module | None = None,
        label_smoothing: float = 0.0,
        precision: str = "fp32",
        deterministic: bool = False,
    ) -> None:
        self.model = PlainNet() if model is None else model
        self.learner = LocalizedLearner(self.model, torch.zeros(1, 3, 8, 8), lr=LOCAL_LR)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        group = dist.group.WORLD if dist.is_initialized() else None
        self.traffic = Traffic()
        self.region = RegionDDP(self.model, group, self.traffic, deterministic=deterministic)
        self.replicas = make_replicas(ReplicaConfig(mode, every), self.learner, group, self.traffic)
        self.optimizer = RegionOptimizer(self.model, OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-2))
        self.train_step = TrainStep(
            TrainConfig(precision=precision, device="cpu"),
            self.region,
            self.replicas,
            self.optimizer,
            world_size=self.world_size,
            device=CPU,
            label_smoothing=label_smoothing,
        )
        self.tally = Tally(CPU)

    def step(self, *batches: tuple[Tensor, Tensor]) -> None:
        """One step on global micro-batches."""
        self.train_step([share(*batch, self.rank, self.world_size) for batch in batches], self.tally)

    def shift(self, boundary: int) -> None:
        self.replicas.synchronise()
        self.optimizer.release(self.learner.advance(boundary))
        self.region.refresh()
        self.replicas.refresh()


def plain(model: PlainNet | None = None, boundary: int = 0) -> PlainTraining:
    training = PlainTraining(model or PlainNet(), lr=0.05, local_lr=LOCAL_LR)
    training.shift(boundary)
    return training


# --- uneven shares ------------------------------------------------------------------------------------------------

#: Global batches: full ones, and last ones that leave some ranks one sample less, or none.
SIZES = (8, 5, 3, 1, 8, 6, 1)


def train_uneven(boundary: int, label_smoothing: float, soft: bool) -> tuple[Weights, list[float]]:
    training = Training("all_reduce", label_smoothing=label_smoothing)
    training.shift(boundary)
    for seed, size in enumerate(SIZES):
        training.step(global_batch(size, seed, soft))
    return weights_of(training.model), training.tally.sums()


@pytest.mark.parametrize(
    ("boundary", "label_smoothing", "soft"), [(0, 0.0, False), (3, 0.0, False), (3, 0.2, True), (len(LAYERS), 0, False)]
)
def test_uneven_shares_equal_one_process(ranks: Any, boundary: int, label_smoothing: float, soft: bool) -> None:
    results = ranks.run(train_uneven, boundary, label_smoothing, soft)

    reference = PlainTraining(PlainNet(), lr=0.05, local_lr=LOCAL_LR, label_smoothing=label_smoothing)
    reference.shift(boundary)
    loss_sum = correct = 0.0
    for seed, size in enumerate(SIZES):
        images, targets = global_batch(size, seed, soft)
        with torch.no_grad():
            logits = reference.model(images)
        classes = targets.argmax(dim=1) if soft else targets
        loss_sum += size * F.cross_entropy(logits, targets, label_smoothing=label_smoothing).item()
        correct += (logits.argmax(dim=1) == classes).sum().item()
        reference.step(images, targets)
    for weights, _ in results:
        assert_close(weights, weights_of(reference.model), rtol=1e-4, atol=5e-6)
    assert_bit_equal([weights for weights, _ in results])
    total = np.sum([sums for _, sums in results], axis=0)
    np.testing.assert_allclose(total, [loss_sum, correct, sum(SIZES)], rtol=1e-5)


# --- gradient accumulation ----------------------------------------------------------------------------------------

#: Global micro-batches of each step; the last of step 3 leaves ranks without a sample.
MICRO = ((8, 8, 8, 8), (8, 8, 8, 8), (8, 8, 8, 1), (8, 8, 8, 3), (8,))
#: Boundary before each step.
BOUNDARIES = (0, 2, 2, 3, 3)


def train_accumulated(deterministic: bool = False) -> Weights:
    training = Training("all_reduce", deterministic=deterministic)
    for step, (sizes, boundary) in enumerate(zip(MICRO, BOUNDARIES, strict=True)):
        if boundary != training.learner.boundary:
            training.shift(boundary)
        training.step(*(samples(size, 10 * step + i) for i, size in enumerate(sizes)))
        if dist.is_initialized():
            taken = training.traffic.take()
            assert taken.gradient_bytes == sum(4 * p.numel() for p in training.optimizer.parameters)
            assert taken.replica_bytes == sum(4 * layer.weight.numel() for layer in training.learner.updated_layers)
    return weights_of(training.model)


def plain_accumulated() -> Weights:
    reference = plain()
    for step, (sizes, boundary) in enumerate(zip(MICRO, BOUNDARIES, strict=True)):
        reference.shift(boundary)
        images, targets = zip(*(samples(size, 10 * step + i) for i, size in enumerate(sizes)), strict=True)
        reference.step(torch.cat(images), torch.cat(targets))
    return weights_of(reference.model)


@pytest.mark.parametrize("deterministic", [False, True])
def test_accumulation_of_four_across_shifts_equals_one_large_batch(ranks: Any, deterministic: bool) -> None:
    results = ranks.run(train_accumulated, deterministic)
    for weights in results:
        assert_close(weights, plain_accumulated(), rtol=1e-4, atol=5e-6)
    assert_bit_equal(results)


def test_accumulation_in_a_world_of_one() -> None:
    assert not dist.is_initialized()
    assert_close(train_accumulated(), plain_accumulated(), rtol=1e-4, atol=5e-6)


# --- a rank without samples ---------------------------------------------------------------------------------------


def step_with_filler(mode: str) -> dict[str, Any]:
    """A full step, then one with a single sample, which rank 0 gets."""
    training = Training(mode, model=NormNet())
    training.shift(2)
    training.model[4].eval()  # a norm that is held in evaluation mode, as in fine-tuning
    training.step(samples(8, 0))
    before = weights_of(training.model)
    training.step(samples(1, 1))
    owned = assign_owners(training.learner.updated_layers, dist.get_world_size())
    return {
        "before": before,
        "after": weights_of(training.model),
        "modes": [module.training for module in training.model],
        "owned_by_rank_0": [layer.name for layer in owned[0]],
        "tally": training.tally.sums()[2],
    }


@pytest.mark.parametrize("mode", ["sharded", "all_reduce", "periodic"])
def test_a_rank_without_samples_learns_nothing_from_its_filler(ranks: Any, mode: str) -> None:
    results = ranks.run(step_with_filler, mode)
    statistics = [n for n in results[0]["before"] if "running" in n or "num_batches" in n]
    assert statistics
    localized = ["0.weight", "3.weight"]
    for rank, result in enumerate(results):
        before, after = result["before"], result["after"]
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        norms_in_training = [n for n in statistics if not n.startswith("4.")]
        assert changed.issuperset(norms_in_training) == (rank == 0)
        assert changed.isdisjoint(norms_in_training) == (rank != 0)
        # The SGD region moves everywhere.
        assert changed >= {"6.weight", "11.weight", "11.bias"}
        assert result["modes"] == [index != 4 for index in range(12)]
        assert result["tally"] == 8 / ranks.world_size + (rank == 0)
        if mode == "sharded":
            # The owner alone computes: where that is a rank without samples, the layer waits.
            assert changed & set(localized) == {f"{name}.weight" for name in result["owned_by_rank_0"]}
        else:  # the sum over ranks, or the mean of weights, has rank 0's part in it
            assert changed >= set(localized)
    trained = [n for n in results[0]["after"] if n not in statistics]
    assert_bit_equal([{name: result["after"][name] for name in trained} for result in results])


# --- a step that is only tried --------------------------------------------------------------------------------------


class DoesNotFit(nn.Module):
    """Runs out of memory on one rank, in the backward pass of a batch of the given size."""

    def __init__(self, batch: int, rank: int) -> None:
        super().__init__()
        self.batch = batch if dist.get_rank() == rank else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        if len(x) == self.batch and y.requires_grad:
            y.register_hook(self._fail)
        return y

    def _fail(self, gradient: Tensor) -> None:
        raise RuntimeError("out of memory")


def train_with_trials(mode: str, every: int, trials: bool, deterministic: bool) -> tuple[Any, ...]:
    """Weights and momentum, random state, bytes sent and failed trials of a run with a shift."""
    torch.manual_seed(dist.get_rank())
    model = NormNet()
    model.insert(7, DoesNotFit(batch=7, rank=1))
    training = Training(mode, every, model=model, deterministic=deterministic)
    failures = []
    for step in range(8):
        if step == 3:
            training.shift(2)
        if trials and step in (0, 3, 5, 6):
            for per_gpu in (6, 7):
                try:
                    training.train_step.trial(per_gpu, (3, 8, 8), CLASSES)
                except RuntimeError as error:
                    failures.append(f"step {step}, batch {per_gpu}: {error}")
        training.step(samples(8, step))
    training.replicas.synchronise()
    state = weights_of(model) | {
        f"optimizer/{n}": s["momentum_buffer"].numpy() for n, s in training.optimizer.state_dict().items()
    }
    traffic = training.traffic.take()
    return state, torch.get_rng_state().tolist(), [traffic.replica_bytes, traffic.gradient_bytes], failures


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("mode", "every"), [("sharded", 4), ("periodic", 2)])
def test_a_trial_leaves_no_trace(two_ranks: Any, mode: str, every: int, deterministic: bool) -> None:
    """Not even where one rank alone runs out of memory in its backward pass."""
    plainly = two_ranks.run(train_with_trials, mode, every, False, deterministic)
    with_trials = two_ranks.run(train_with_trials, mode, every, True, deterministic)
    for rank, (expected, actual) in enumerate(zip(plainly, with_trials, strict=True)):
        assert_bit_equal([expected[0], actual[0]])
        assert expected[1:3] == actual[1:3]
        assert len(actual[3]) == (4 if rank == 1 else 0)


# --- mixed precision ----------------------------------------------------------------------------------------------


def train_bf16() -> Weights:
    training = Training("all_reduce", precision="bf16")
    training.shift(2)
    for seed in range(4):
        training.step(samples(8, seed))
    return weights_of(training.model)


def test_bf16_stays_near_fp32_and_ranks_stay_equal(two_ranks: Any) -> None:
    results = two_ranks.run(train_bf16)
    assert_bit_equal(results)
    reference, start = plain(boundary=2), weights_of(PlainNet())
    for seed in range(4):
        reference.step(*samples(8, seed))
    for name, expected in weights_of(reference.model).items():
        moved = np.linalg.norm(expected - start[name])
        error = np.linalg.norm(results[0][name] - expected)
        assert results[0][name].dtype == np.float32
        # bf16 keeps 8 bits: 0.4 % per rounding.
        assert error <= 0.05 * moved, name
        assert (error > 0) == (moved > 0), name


# --- evaluation ---------------------------------------------------------------------------------------------------


def evaluate_shares(count: int) -> tuple[list[float], list[bool]]:
    model = NormNet()
    model[1].running_mean.fill_(0.5)
    model.train()
    model[4].eval()
    images, targets = samples(count, 0)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    x, y = images[mine], targets[mine]
    batches = [Batch(a, b, count, len(b)) for a, b in zip(x.split(3), y.split(3), strict=True) if len(b)]
    sums = evaluate(model, batches, TrainConfig(device="cpu"), CPU)
    assert model[1].running_mean.eq(0.5).all()
    return sums, [module.training for module in model]


@pytest.mark.parametrize("count", [1, 3, 11])
def test_evaluation_counts_each_sample_once(four_ranks: Any, count: int) -> None:
    results = four_ranks.run(evaluate_shares, count)
    model = NormNet().eval()
    model[1].running_mean.fill_(0.5)
    images, targets = samples(count, 0)
    with torch.no_grad():
        logits = model(images)
    loss = F.cross_entropy(logits, targets, reduction="sum").item()
    correct = (logits.argmax(dim=1) == targets).sum().item()
    np.testing.assert_allclose(np.sum([sums for sums, _ in results], axis=0), [loss, correct, count], rtol=1e-5)
    assert all(modes == [index != 4 for index in range(12)] for _, modes in results)


def test_share_gives_each_sample_to_one_rank() -> None:
    """The shares of these tests are what they are meant to be."""

    def sizes(count: int, world_size: int) -> Sequence[int]:
        return [share(*samples(count, 0), rank, world_size).local_size for rank in range(world_size)]

    assert sizes(5, 2) == [3, 2]
    assert sizes(1, 2) == [1, 0]
    assert sizes(6, 4) == [2, 2, 1, 1]
