"""Networks that really collapse, and how their runs end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import train
from rank_pool import free_ports, world_of_its_own

from locsgd_dist import train as command
from locsgd_dist.checkpoint import checkpointed_epochs
from locsgd_dist.faults import CollapsedError
from locsgd_dist.recording import RunDirectory

# The SGD region's rate falls to nothing when the localized region begins to move, as in the paper's printed schedule.
FLAGS = [
    "--model.name=interrupted_runs:small_network",
    "--model.width=null",
    "--data.name=digits",
    "--data.train_samples=200",
    "--data.image_size=16",
    "--data.workers=0",
    "--train.epochs=8",
    "--train.device=cpu",
    "--optim.schedule=step",
    "--optim.step_epochs=4",
    "--optim.step_gamma=1e-4",
    "--batch.per_gpu=10",
    "--batch.policy=fixed",
    "--localized.rule=hebbian",
    "--localized.weak_supervision=false",
    "--selection.kind=fixed",
    "--selection.boundary=2",
    "--selection.start_epoch=4",
    "--run.console=plain",
    "--run.report_every=null",
    "--monitor.trace_hz=0",
]


def collapses(run_dir: Path) -> list[tuple[int, str]]:
    return [(e["epoch"], e["kind"]) for e in RunDirectory(run_dir).load_events() if e["type"] == "collapse"]


def test_a_step_of_healthy_length_is_no_collapse_and_a_huge_one_is(tmp_path: Path) -> None:
    healthy, huge = tmp_path / "healthy", tmp_path / "huge"
    train([*FLAGS, "--localized.lr=0.001", f"--run.dir={healthy}"])
    train([*FLAGS, "--localized.lr=2", f"--run.dir={huge}"])
    assert collapses(healthy) == []
    losses = [epoch["train_loss"] for epoch in RunDirectory(huge).load_metrics()]
    assert len(losses) == 8
    assert losses[3] < 1.6 < 2.2 < losses[-1]
    told = collapses(huge)
    assert sorted(kind for _, kind in told) == ["loss", "norm", "rank"]
    assert min(epoch for epoch, _ in told) >= 4


def test_stop_saves_and_ends_the_run_and_warn_lets_it_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    flags = ["--config", "quickstart", *FLAGS, "--localized.lr=2", f"--run.dir={run_dir}"]
    assert command.main([*flags, "--faults.on_collapse=stop"]) == 1
    said = capsys.readouterr()
    assert "collapse: localized weights" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith("locsgd: error: the network has collapsed (epoch 5: localized weights")
    ended = len(RunDirectory(run_dir).load_metrics())
    assert ended == checkpointed_epochs(run_dir) < 8
    # torchrun starts a run that has failed anew: it ends at once.
    assert command.main([*flags, "--faults.on_collapse=stop"]) == 1
    assert len(RunDirectory(run_dir).load_metrics()) == ended
    assert command.main(flags) == 0
    assert len(RunDirectory(run_dir).load_metrics()) == 8
    kinds = [kind for _, kind in collapses(run_dir)]
    assert len(kinds) == len(set(kinds))


@pytest.mark.usefixtures("full_disk")
def test_a_collapsed_run_that_cannot_be_saved_says_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "quickstart", *FLAGS, "--localized.lr=2", f"--run.dir={tmp_path}"]
    assert command.main([*flags, "--faults.on_collapse=stop"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locsgd: error: ")]
    assert line.startswith("locsgd: error: the network has collapsed (epoch 5: localized weights")
    assert "), and the trained network could not be saved: No space left on device; started again" in line


def stopped_on_rank(ports: list[int], run_dir: str) -> tuple[str, int]:
    """What ended the training on this rank, and how many epochs it holds then."""
    with world_of_its_own(ports):
        try:
            train([*FLAGS, "--localized.lr=2", "--faults.on_collapse=stop", f"--run.dir={run_dir}"])
        except CollapsedError as error:
            return str(error), checkpointed_epochs(Path(run_dir))
    return "", 0


def test_all_ranks_stop_alike(two_ranks: Any, tmp_path: Path) -> None:
    first, second = two_ranks.run(stopped_on_rank, free_ports(2), str(tmp_path / "run"))
    assert first == second
    said, epochs = first
    assert said.startswith("the network has collapsed")
    assert 5 <= epochs < 8
