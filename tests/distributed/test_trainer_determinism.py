"""The trainer on two ranks: the same seed gives the same numbers, whatever else the process did before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from plain_reference import Weights, assert_bit_equal
from rank_pool import free_ports, world_of_its_own

from locsgd_dist.checkpoint import CheckpointStore, load_state
from locsgd_dist.config import parse_config
from locsgd_dist.recording import RunDirectory
from locsgd_dist.trainer import Trainer

#: What a clock decides. The footprint is not among it: on the CPU it is exact, and the batch follows it.
MEASURED = {"seconds", "cpu_seconds", "eval_seconds", "images_per_second"}
FLAGS = (
    "--data.name=digits",
    "--data.train_samples=150",
    "--data.image_size=16",
    "--model.name=resnet18",
    "--model.width=2",
    "--batch.per_gpu=16",
    "--train.epochs=3",
    "--train.seed=3",
    "--train.device=cpu",
    "--optim.ema_decay=0.9",
    # The rate of the first epoch does not depend on how many there are.
    "--optim.schedule=step",
    "--optim.step_epochs=1",
    "--selection.kind=fixed",
    "--selection.boundary=5",
    "--selection.start_epoch=1",
    "--localized.rule=hebbian",
    "--replicas.mode=sharded",
    "--replicas.every=4",
    "--run.console=quiet",
    "--run.report_every=null",
)


def train(ports: list[int], run_dir: str, changes: list[str]) -> list[dict[str, Any]]:
    """Trains in a world of its own (the trainer makes and closes one), then puts the pool's back."""
    with world_of_its_own(ports):
        # A process that has drawn random numbers before must not differ from one that has not.
        random.seed(ports[0])
        torch.manual_seed(ports[0])
        with Trainer(parse_config(["--config", "quickstart", *FLAGS, f"--run.dir={run_dir}", *changes])) as t:
            t.fit()
            return [
                {name: value.numpy().copy() for name, value in model.state_dict().items()} for model in (t.model, t.ema)
            ]


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in metrics.items() if key not in MEASURED}
        for metrics in RunDirectory(run_dir).load_metrics()
    ]


def test_same_seed_same_numbers_on_two_ranks(two_ranks: Any, tmp_path: Path) -> None:
    runs: dict[str, list[dict[str, Any]]] = {}
    trained: dict[str, Weights] = {}
    for name, changes in (("first", []), ("second", []), ("other", ["--train.seed=4", "--train.epochs=1"])):
        results = two_ranks.run(train, free_ports(2), str(tmp_path / name), changes)
        for states in zip(*results, strict=True):
            assert_bit_equal(states)  # the network and the averaged network, on both ranks
        runs[name], trained[name] = numbers(tmp_path / name), results[0][0]
    assert [epoch["boundary"] for epoch in runs["first"]] == [0, 5, 5]
    assert runs["first"] == runs["second"]
    assert_bit_equal([trained["first"], trained["second"]])
    assert runs["other"][0]["train_loss"] != runs["first"][0]["train_loss"]

    checkpoint = load_state(CheckpointStore(tmp_path / "second" / "checkpoints").paths()[-1])
    assert_bit_equal([trained["first"], {name: value.numpy() for name, value in checkpoint["model"].items()}])
