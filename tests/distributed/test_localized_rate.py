"""The length of a localized step in a run: in proportion to the SGD region's rate, shared out over an epoch's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import run
from test_mid_epoch_resume import FLAGS

from locsgd_dist.recording import RunDirectory


@pytest.mark.parametrize(
    ("flags", "steps_per_epoch"),
    [
        (["--localized.lr_schedule=optim"], 1.0),
        # 70 samples on two ranks, 4 images and 2 batches each, whatever the batch grows to.
        (["--localized.lr_schedule=optim", "--localized.lr_per=epoch", "--train.gradient_accumulation=2"], 70 / 16),
    ],
    ids=["follows", "of an epoch"],
)
def test_the_localized_rate_of_a_run(flags: list[str], steps_per_epoch: float, two_ranks: Any, tmp_path: Path) -> None:
    run(two_ranks, [*FLAGS, *flags, "--localized.lr=0.3", "--optim.warmup_epochs=0.5", f"--run.dir={tmp_path}"])
    records = RunDirectory(tmp_path).load_metrics()
    assert {record["per_gpu_batch"] for record in records} == {4, 8}
    # The batch's factor is the same for both rates.
    expected = [0.3 * record["lr"] / 0.02 / steps_per_epoch for record in records]
    assert [record["local_lr"] for record in records] == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == len(records)
