"""An image that is not finite on one rank: the step leaves no trace on any, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import numbers, run
from test_mid_epoch_resume import FLAGS

from locsgd_dist import train
from locsgd_dist.recording import RunDirectory

#: In the second half of its rank's batch in both epochs, first of rank 0's, then of rank 1's.
POISONED = 9


@pytest.mark.parametrize(
    "region",
    [
        ["--selection.boundary=2", "--replicas.every=1"],
        ["--selection.boundary=2", "--replicas.every=3"],
        # The whole network rests but for the first half of each batch.
        [
            *("--selection.boundary=null", "--selection.lmax=1", "--localized.rule=frozen"),
            *("--localized.refresh_every=1", "--localized.refresh_fraction=0.5"),
        ],
    ],
    ids=["exchanged in each step", "in every third", "refreshed by a part"],
)
def test_a_poisoned_image_on_one_rank(region: list[str], two_ranks: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = [
        *FLAGS,
        f"--data.kwargs={{count: 40, poisoned: {POISONED}}}",
        "--train.epochs=2",
        "--batch.policy=fixed",
        "--selection.kind=fixed",
        *region,
        f"--run.dir={run_dir}",
    ]
    ranks = run(two_ranks, flags)
    is_bad = [
        any(POISONED in step.labels for step in steps) for steps in zip(*(rank.steps for rank in ranks), strict=True)
    ]
    assert sum(is_bad) == 2  # once an epoch
    for rank in ranks:
        assert all(step.is_finite for step in rank.steps)
        assert [step.moved == set() for step in rank.steps] == is_bad
    recorded = numbers(run_dir)
    assert [epoch["skipped_steps"] for epoch in recorded] == [1, 1]
    assert all(epoch["train_loss"] is not None for epoch in recorded)
    bad_steps = [event for event in RunDirectory(run_dir).load_events() if event["type"] == "bad_step"]
    assert [event["skipped_steps"] for event in bad_steps] == [1, 1]


def test_a_run_that_only_makes_bad_steps_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step an epoch, with an image in it that is not finite."""
    poisoned = [
        "--data.kwargs={count: 8, poisoned: 3}",
        "--batch.per_gpu=8",
        "--batch.policy=fixed",
        "--train.epochs=9",
        "--faults.max_bad_steps=3",
    ]
    assert train.main(["--config", "quickstart", *FLAGS, *poisoned, f"--run.dir={tmp_path / 'run'}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line == (
        "locsgd: error: 3 steps in a row had a loss or gradient that is not finite; look at the data and lower "
        "optim.lr or localized.lr (faults.max_bad_steps is the number allowed)"
    )
    # The third epoch did not come to its end; the skipped steps are on record.
    assert [record["skipped_steps"] for record in numbers(tmp_path / "run")] == [1, 1]
    bad = [event for event in RunDirectory(tmp_path / "run").load_events() if event["type"] == "bad_step"]
    assert [event["samples_seen"] for event in bad] == [8, 16]
