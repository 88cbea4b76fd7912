"""Refresh steps: the localized region learns by its true gradient in every n-th step, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import LAYERS, NormNet, PlainNet, Weights, assert_bit_equal, assert_close, samples, weights_of
from torch import nn

from locsgd_dist.data import Batch
from locsgd_dist.distributed import Refresh, RegionDDP, ReplicaConfig, Traffic, make_replicas
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.step import Tally, TrainConfig, TrainStep

OPTIM = OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-2)
CPU = torch.device("cpu")
STEPS, SHIFT_AT, BATCH = 7, 2, 8
LARGER_BATCH = 24
NORM_NET_LAYERS = 4


class Training:
    def __init__(
        self,
        model: nn.Module,
        *,
        rule: str = "frozen",
        every: int = 0,
        recompute: bool = False,
        fraction: float = 1,
        gain: float = 1,
        carry: bool = False,
    ):
        self.model = model
        self.learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), rule=rule, lr=0.02)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        group = dist.group.WORLD if dist.is_initialized() else None
        self.traffic = Traffic()
        self.region = RegionDDP(model, group, self.traffic)
        self.replicas = make_replicas(ReplicaConfig("sharded", 2), self.learner, group, self.traffic)
        config = LocalizedConfig(
            refresh_every=every,
            refresh_recompute=recompute,
            refresh_fraction=fraction,
            refresh_gain=gain,
            refresh_carry=carry,
        )
        self.refresh = Refresh(self.learner, group, self.traffic, config)
        self.optimizer = RegionOptimizer(model, OPTIM, keeps_released=every > 0, carries_released=carry)
        self.step = TrainStep(
            TrainConfig(device="cpu"),
            self.region,
            self.replicas,
            self.optimizer,
            refresh=self.refresh,
            world_size=self.world_size,
            device=CPU,
        )

    def run(self, boundary: int, batch: int = BATCH) -> Weights:
        tally = Tally(CPU)
        for index in range(STEPS):
            if index == SHIFT_AT and boundary:
                self.replicas.synchronise()
                self.optimizer.release(self.learner.advance(boundary))
                self.region.refresh()
                self.replicas.refresh()
            images, targets = samples(batch, index)
            mine = slice(self.rank, None, self.world_size)
            self.step([Batch(images[mine], targets[mine], batch, len(targets[mine]))], tally)
        self.replicas.synchronise()
        return weights_of(self.model)


def train(
    network: str, boundary: int, options: dict[str, Any], batch: int = BATCH, *, channels_last: bool = False
) -> Weights:
    torch.manual_seed(0)
    model = NormNet() if network == "norm" else PlainNet()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    training = Training(model, **options)
    finish = training.refresh.finish_reducing

    def finish_and_look() -> None:
        finish()
        for parameter in training.learner.released:
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()

    training.refresh.finish_reducing = finish_and_look  # type: ignore[method-assign]
    return training.run(boundary, batch)


def train_channels_last(network: str, boundary: int, options: dict[str, Any]) -> Weights:
    return train(network, boundary, options, channels_last=True)


@pytest.mark.parametrize("boundary", [3, NORM_NET_LAYERS])
def test_a_refresh_every_step_is_plain_sgd_bit_for_bit(two_ranks: Any, boundary: int) -> None:
    assert_bit_equal([train("norm", 0, {}), train("norm", boundary, {"every": 1})])
    together = two_ranks.run(train, "norm", 0, {})
    refreshed = two_ranks.run(train, "norm", boundary, {"every": 1})
    for plain, other in zip(together, refreshed, strict=True):
        assert_bit_equal([plain, other])


def test_in_channels_last_too(two_ranks: Any) -> None:
    together = two_ranks.run(train_channels_last, "norm", 0, {})
    refreshed = two_ranks.run(train_channels_last, "norm", NORM_NET_LAYERS, {"every": 1})
    for plain, other in zip(together, refreshed, strict=True):
        assert_bit_equal([plain, other])


def reference(boundary: int, every: int, gain: float, carry: bool) -> Weights:
    """Plain torch on whole batches: outside refresh steps the localized region has no gradient, so nothing moves it;
    where momentum is carried on, its gradient is zero there, and its weights do not decay."""
    torch.manual_seed(0)
    model = PlainNet()
    localized = [p for name in LAYERS[:boundary] for p in model.get_submodule(name).parameters()]
    rest = [p for name in LAYERS[boundary:] for p in model.get_submodule(name).parameters()]
    optimizer = torch.optim.SGD(
        [{"params": localized}, {"params": rest}],
        lr=OPTIM.lr,
        momentum=OPTIM.momentum,
        weight_decay=OPTIM.weight_decay,
    )
    for index in range(STEPS):
        optimizer.zero_grad()
        images, targets = samples(BATCH, index)
        F.cross_entropy(model(images), targets).backward()
        if index >= SHIFT_AT:
            is_refresh = (index + 1) % every == 0
            optimizer.param_groups[0]["weight_decay"] = OPTIM.weight_decay if is_refresh else 0.0
            for parameter in localized:
                assert parameter.grad is not None
                factor = gain if is_refresh else 0.0
                parameter.grad = parameter.grad * factor if is_refresh or carry else None
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize("carry", [False, True])
def test_between_refreshes_the_regions_momentum_rests_or_is_carried_on(
    ranks: Any, carry: bool, gain: float, recompute: bool
) -> None:
    options = {"every": 3, "gain": gain, "recompute": recompute, "carry": carry}
    results = ranks.run(train, "plain", 3, options)
    assert_bit_equal(results)
    assert_close(results[0], reference(3, 3, gain, carry), rtol=1e-4, atol=5e-6)


def reference_in_part(world_size: int, boundary: int, every: int, sizes: dict[int, int], gain: float) -> Weights:
    """Plain torch: in a refresh step the region's gradient is that of the mean loss of each rank's first samples.

    ``sizes``: how many of them there are to be, by the size of a rank's share.
    """
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, weight_decay=OPTIM.weight_decay
    )
    localized = [p for name in LAYERS[:boundary] for p in model.get_submodule(name).parameters()]
    for index in range(STEPS):
        images, targets = samples(LARGER_BATCH, index)
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        if index >= SHIFT_AT:
            gradients: list[torch.Tensor | None] = [None] * len(localized)
            if (index + 1) % every == 0:
                loss = torch.zeros(())
                for rank in range(world_size):
                    share = slice(rank, None, world_size)
                    seen = sizes[len(targets[share])]
                    first = F.cross_entropy(model(images[share][:seen]), targets[share][:seen])
                    loss = loss + first * len(targets[share]) / len(targets)
                gradients = [gain * g for g in torch.autograd.grad(loss, localized)]
            for parameter, gradient in zip(localized, gradients, strict=True):
                parameter.grad = gradient
        optimizer.step()
    return weights_of(model)


# A rank has 12 or 6 samples; neither part may be a single one.
@pytest.mark.parametrize(("fraction", "sizes"), [(0.25, {12: 3, 6: 2}), (0.5, {12: 6, 6: 3}), (0.9, {12: 12, 6: 6})])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_part_of_the_batch_refreshes_the_region_and_all_of_it_trains_the_rest(
    ranks: Any, fraction: float, sizes: dict[int, int], recompute: bool
) -> None:
    options = {"every": 2, "fraction": fraction, "gain": 1.5, "recompute": recompute}
    results = ranks.run(train, "plain", 3, options, LARGER_BATCH)
    assert_bit_equal(results)
    expected = reference_in_part(ranks.world_size, 3, 2, sizes, 1.5)
    assert_close(results[0], expected, rtol=1e-4, atol=5e-6)


def test_the_rule_learns_from_the_rest_of_a_batch_that_refreshes_in_part(two_ranks: Any) -> None:
    options = {"every": 1, "fraction": 0.5}
    results = two_ranks.run(train, "norm", 3, {"rule": "hebbian", **options})
    assert_bit_equal([{k: v for k, v in result.items() if "running" not in k} for result in results])
    frozen = two_ranks.run(train, "norm", 3, {"rule": "frozen", **options})
    assert (results[0]["0.weight"] != frozen[0]["0.weight"]).any()


def test_the_rule_learns_between_refreshes(two_ranks: Any) -> None:
    results = two_ranks.run(train, "norm", 3, {"rule": "hebbian", "every": 3})
    assert_bit_equal([{k: v for k, v in result.items() if "running" not in k} for result in results])
    frozen = two_ranks.run(train, "norm", 3, {"rule": "frozen", "every": 3})
    assert (results[0]["0.weight"] != frozen[0]["0.weight"]).any()


def bytes_by_step(every: int) -> tuple[list[int], int, int]:
    torch.manual_seed(0)
    training = Training(NormNet(), every=every)
    training.optimizer.release(training.learner.advance(3))
    training.region.refresh()
    sent: list[int] = []
    for index in range(2 * every):
        images, targets = samples(BATCH, index)
        mine = slice(training.rank, None, training.world_size)
        training.step([Batch(images[mine], targets[mine], BATCH, len(targets[mine]))], Tally(CPU))
        sent.append(training.traffic.take().gradient_bytes)
    sizes = _bytes(training.model.parameters())
    return sent, sizes, sizes - _bytes(training.learner.released)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def test_a_refresh_step_sends_every_gradient_and_the_others_those_of_the_sgd_region(two_ranks: Any) -> None:
    for sent, whole, region in two_ranks.run(bytes_by_step, 3):
        assert sent == [region, region, whole] * 2


def order_of_a_step(options: dict[str, Any]) -> list[str]:
    torch.manual_seed(0)
    training = Training(PlainNet(), every=1, **options)
    training.optimizer.release(training.learner.advance(3))
    training.region.refresh()
    order: list[str] = []
    start, finish = training.refresh._start_all_reduce, training.refresh.finish_reducing
    training.refresh._start_all_reduce = lambda flat: order.append("send") or start(flat)  # type: ignore[method-assign]
    training.refresh.finish_reducing = lambda: order.append("await") or finish()  # type: ignore[method-assign]
    training.model.register_forward_pre_hook(lambda *_: order.append("forward"))
    training.model.register_forward_hook(
        lambda _, __, logits: logits.register_hook(lambda _: order.append("backward")) and None
    )
    images, targets = samples(BATCH, 0)
    mine = slice(training.rank, None, training.world_size)
    training.step([Batch(images[mine], targets[mine], BATCH, len(targets[mine]))], Tally(CPU))
    return order


def test_gradients_of_a_part_travel_beside_the_pass_of_the_rest(two_ranks: Any) -> None:
    one_pass = ["forward", "backward"]
    in_part = [*one_pass, "send", *one_pass, "await"]
    assert two_ranks.run(order_of_a_step, {"fraction": 0.5}) == [in_part, in_part]
    assert two_ranks.run(order_of_a_step, {}) == [[*one_pass, "send", "await"]] * 2


def train_where_a_rank_is_empty(empty_at: int, recompute: bool) -> tuple[Weights, Weights]:
    """A rank without samples in one step after the shift; the weights, and those of plain torch on rank 0's samples."""
    torch.manual_seed(0)
    training = Training(PlainNet(), every=1, fraction=0.5, recompute=recompute)
    training.optimizer.release(training.learner.advance(3))
    training.region.refresh()
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, weight_decay=OPTIM.weight_decay
    )
    localized = [p for name in LAYERS[:3] for p in model.get_submodule(name).parameters()]
    for index in range(4):
        images, targets = samples(BATCH, index)
        shares = [BATCH, 0] if index == empty_at else [BATCH // 2, BATCH // 2]
        starts = [0, shares[0]]
        start, size = starts[training.rank], shares[training.rank]
        mine = slice(start, start + size) if size else slice(0, 1)  # a filler, as the loader gives it
        training.step([Batch(images[mine], targets[mine], BATCH, size)], Tally(CPU))
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        loss = torch.zeros(())
        for begin, count in zip(starts, shares, strict=True):
            if count:
                first = slice(begin, begin + count // 2)
                loss = loss + F.cross_entropy(model(images[first]), targets[first]) * count / BATCH
        for parameter, gradient in zip(localized, torch.autograd.grad(loss, localized), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return weights_of(training.model), weights_of(model)


# DDP settles its buckets, by a collective of its own, in the second step after a shift.
@pytest.mark.parametrize("empty_at", [0, 1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_rank_without_samples_meets_the_others_collectives(two_ranks: Any, empty_at: int, recompute: bool) -> None:
    results = two_ranks.run(train_where_a_rank_is_empty, empty_at, recompute)
    assert_bit_equal([weights for weights, _ in results])
    for weights, expected in results:
        assert_close(weights, expected, rtol=1e-4, atol=5e-6)


def test_the_count_of_steps_is_restored() -> None:
    learner = LocalizedLearner(PlainNet(), torch.zeros(1, 3, 8, 8), rule="frozen")
    learner.advance(1)
    refresh = Refresh(learner, None, Traffic(), LocalizedConfig(refresh_every=3))
    due: list[bool] = []
    for _ in range(7):
        # As after a restart: a new object with the old one's state.
        restored = Refresh(learner, None, Traffic(), LocalizedConfig(refresh_every=3))
        restored.load_state_dict(refresh.state_dict())
        refresh = restored
        due.append(refresh.is_due)
        refresh.finish_step()
    assert due == [False, False, True, False, False, True, False]
