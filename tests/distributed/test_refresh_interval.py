"""Refresh steps of a run become rarer, or more frequent, from epoch to epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import run
from test_mid_epoch_resume import FLAGS

from locsgd_dist.recording import RunDirectory


@pytest.mark.parametrize(
    ("every", "growth", "intervals"), [(1, 8, [1, 2, 4, 8]), (4, 0.25, [4, 3, 2, 1]), (3, 1, [3, 3, 3, 3])]
)
def test_steps_of_each_epoch(every: int, growth: float, intervals: list[int], two_ranks: Any, tmp_path: Path) -> None:
    flags = [f"--localized.refresh_every={every}", f"--localized.refresh_growth={growth}", "--train.epochs=4"]
    at_rest = ["--localized.rule=frozen", "--selection.kind=fixed", "--selection.boundary=2", "--batch.policy=fixed"]
    run(two_ranks, [*FLAGS, *at_rest, *flags, f"--run.dir={tmp_path}"])
    step = 0
    for record, interval in zip(RunDirectory(tmp_path).load_metrics(), intervals, strict=True):
        steps = range(step, step + record["num_steps"])
        assert record["num_refresh_steps"] == sum((step + 1) % interval == 0 for step in steps) > 0
        # Layers at rest move by true steps alone.
        assert record["layer_update_norm"][0] > 0
        step = steps.stop
