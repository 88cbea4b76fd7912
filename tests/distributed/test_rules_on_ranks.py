"""Rules beyond the paper's on two ranks: replicas stay equal, and what ranks sum is the rule on the global batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plain_reference import PlainNet, Weights, assert_bit_equal, samples

from locsgd_dist.distributed import ReplicaConfig, Traffic, make_replicas
from locsgd_dist.localized import LocalizedLearner, make_rule

BATCH, BOUNDARY = 8, 4
RULES: list[tuple[str, dict[str, Any]]] = [
    ("oja", {}),
    ("softhebb", {"temperature": 0.5}),
    ("winner", {"k": 2, "length": "layer"}),
    ("hebbian_relative", {}),
]


def train(rule: str, options: dict[str, Any], mode: Any, window: int, steps: int) -> Weights:
    """Weights of the localized layers after so many steps of the replicas' protocol, without an SGD region's own."""
    model = PlainNet()
    learner = LocalizedLearner(model, torch.zeros(1, 3, 8, 8), rule=make_rule(rule, 0, options), lr=0.02)
    learner.advance(BOUNDARY)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group = dist.group.WORLD if dist.is_initialized() else None
    replicas = make_replicas(ReplicaConfig(mode, window), learner, group, Traffic())
    replicas.refresh()
    for step in range(steps):
        images, _ = samples(BATCH, seed=step)
        replicas.arm()
        model(images[rank::world_size])
        replicas.start()
        replicas.finish_step()
    replicas.synchronise()
    return {layer.name: layer.weight.detach().numpy().copy() for layer in learner.layers[:BOUNDARY]}


@pytest.mark.parametrize(("rule", "options"), RULES, ids=str)
def test_every_mode_keeps_ranks_equal(rule: str, options: dict[str, Any], two_ranks: Any) -> None:
    for mode, window in (("sharded", 3), ("all_reduce", 1), ("periodic", 2)):
        results = two_ranks.run(train, rule, options, mode, window, 5)
        assert_bit_equal(results)
        for name, start in ((name, getattr(PlainNet(), name).weight) for name in results[0]):
            assert np.isfinite(results[0][name]).all()
            assert not np.array_equal(results[0][name], start.detach().numpy())


@pytest.mark.parametrize(("rule", "options"), RULES, ids=str)
def test_summed_updates_are_those_of_the_global_batch(rule: str, options: dict[str, Any], two_ranks: Any) -> None:
    alone = train(rule, options, "all_reduce", 1, 3)
    for together in two_ranks.run(train, rule, options, "all_reduce", 1, 3):
        for name, value in alone.items():
            np.testing.assert_allclose(together[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
