"""The trainer anneals each layer to its own hand-over, on several ranks and across interruptions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import numbers, run
from plain_reference import assert_bit_equal
from test_mid_epoch_resume import FLAGS

from locsgd_dist.config import parse_config
from locsgd_dist.recording import RunDirectory
from locsgd_dist.trainer import Trainer

# In four epochs the boundary stands at 0, 1, 2, 3 of four layers; batches of 4, then 8, of 70 images.
ANNEALED = [
    "--selection.kind=linear",
    "--selection.tshift=1",
    "--selection.anneal=true",
    "--selection.anneal_scale=equal_area",
    "--optim.schedule=linear",
]
HAND_OVERS = {"0": 1, "1": 1, "3": 2, "4": 2, "7": 3}


class NotedRates:
    """A trainer's step that notes the learning rate of each parameter before it is taken."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._step = trainer.step
        self.notes: list[tuple[float, dict[str, float]]] = []

    def __call__(self, batches: Any, tally: Any) -> None:
        names = {parameter: name for name, parameter in self._trainer.model.named_parameters()}
        groups = self._trainer.optimizer.optimizer.param_groups
        rates = {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}
        self.notes.append((self._trainer.progress.samples_seen / 70, rates))
        self._step(batches, tally)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def test_every_step_has_the_rates_of_the_closed_form(tmp_path: Path) -> None:
    flags = [*FLAGS, *ANNEALED, "--batch.lr_ramp_epochs=0", f"--run.dir={tmp_path}"]
    with Trainer(parse_config(["--config", "quickstart", *flags])) as trainer:
        trainer.step, steps = (noted := NotedRates(trainer)), noted.notes  # type: ignore[assignment]
        trainer.fit()
    recorded = RunDirectory(tmp_path).load_metrics()
    assert [epoch["boundary"] for epoch in recorded] == [0, 1, 2, 3]
    assert {epoch["per_gpu_batch"] for epoch in recorded} == {4, 8}
    assert all(epoch["transition_update_norm_per_lr"] is None for epoch in recorded)
    for epoch, rates in steps:
        growth = recorded[int(epoch)]["per_gpu_batch"] / 4
        for name, rate in rates.items():
            hand_over = HAND_OVERS.get(name.partition(".")[0])
            if hand_over is None:
                expected = 0.02 * (1 - epoch / 4)
            else:
                assert epoch < hand_over, "it has left the optimizer by then"
                expected = 4 / hand_over * 0.01 * (1 + math.cos(math.pi * epoch / hand_over))
            assert rate == pytest.approx(growth * expected, rel=1e-9), (epoch, name)


def test_an_annealed_run_cut_off_inside_an_epoch_ends_as_if_it_had_not_been(two_ranks: Any, tmp_path: Path) -> None:
    flags = [*FLAGS, *ANNEALED, "--replicas.every=3"]
    whole = run(two_ranks, [*flags, f"--run.dir={tmp_path / 'whole'}"])
    assert_bit_equal([rank.states[0] for rank in whole])
    flags += ["--checkpoint.every_steps=4", f"--run.dir={tmp_path / 'cut'}"]
    assert {rank.end for rank in run(two_ranks, flags, cut_after=14)} == {"cut off"}
    resumed = run(two_ranks, flags)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    for before, after in zip(whole, resumed, strict=True):
        for states in zip(before.states, after.states, strict=True):
            assert_bit_equal(states)
