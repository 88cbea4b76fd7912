"""Momentum of layers that have been handed over goes on moving them in a run, if it is to."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import run
from test_mid_epoch_resume import FLAGS

from locsgd_dist.recording import RunDirectory


@pytest.mark.parametrize("carry", [False, True])
def test_layers_coast_after_their_hand_over(carry: bool, two_ranks: Any, tmp_path: Path) -> None:
    # No true step falls into the run, so that nothing but momentum can move a layer that rests.
    flags = ["--localized.rule=frozen", "--localized.refresh_every=1000", f"--localized.refresh_carry={carry}"]
    run(two_ranks, [*FLAGS, *flags, f"--run.dir={tmp_path}"])
    records = RunDirectory(tmp_path).load_metrics()
    assert sum(record["num_refresh_steps"] for record in records) == 0
    handed_over = 0
    for before, after in itertools.pairwise(records):
        for layer in range(before["boundary"], after["boundary"]):
            assert (after["layer_update_norm"][layer] > 0) == carry
            handed_over += 1
    assert handed_over > 0
