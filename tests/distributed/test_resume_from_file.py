"""`run.resume=PATH`: another run's checkpoint, or an earlier one of the same run, is where training goes on."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from interrupted_runs import Outcome, numbers, run
from plain_reference import assert_bit_equal
from test_mid_epoch_resume import FLAGS

from locsgd_dist import train
from locsgd_dist.checkpoint import CheckpointStore, load_state
from locsgd_dist.recording import RunDirectory

SAMPLES = 40
SHORT = [*FLAGS, f"--data.kwargs={{count: {SAMPLES}}}", "--train.epochs=3", "--batch.policy=fixed", "--batch.per_gpu=8"]


class Whole(NamedTuple):
    """A finished run of three epochs, of which every checkpoint is there."""

    run_dir: Path
    outcome: Outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    (outcome,) = run(None, [*SHORT, "--checkpoint.keep=9", f"--run.dir={run_dir}"])
    return Whole(run_dir, outcome)


def resumes(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in RunDirectory(run_dir).load_events() if event["type"] == "resume"]


def assert_same_end(a: Outcome, b: Outcome) -> None:
    for states in zip(a.states, b.states, strict=True):
        assert_bit_equal(states)


def test_a_new_run_goes_on_from_the_checkpoint_of_another(whole: Whole, tmp_path: Path) -> None:
    path = whole.run_dir / "checkpoints" / "epoch-0001.pt"
    before = contents(whole.run_dir)
    (branched,) = run(None, [*SHORT, f"--run.resume={path}", f"--run.dir={tmp_path / 'branch'}"])
    assert branched.end == "finished"
    assert_same_end(whole.outcome, branched)
    assert numbers(tmp_path / "branch") == numbers(whole.run_dir)[1:]
    (resume,) = resumes(tmp_path / "branch")
    assert (resume["epoch"], resume["samples_seen"], resume["path"]) == (1, SAMPLES, str(path))
    assert contents(whole.run_dir) == before


def first_best(whole: Whole) -> float:
    """The best validation top-1 when the first epoch was over."""
    top1: float = load_state(whole.run_dir / "checkpoints" / "epoch-0001.pt")["progress"]["best_top1"]
    return top1


def best_top1(run_dir: Path) -> float:
    top1: float = load_state(run_dir / "checkpoints" / "best.pt")["progress"]["best_top1"]
    return top1


def test_the_best_checkpoint_is_of_the_run_as_it_is_now(whole: Whole, tmp_path: Path) -> None:
    """Not of epochs that it has turned its back on, and there is one from the first evaluation on."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir)
    folder = run_dir / "checkpoints"
    unbeaten = load_state(folder / "best.pt")
    unbeaten["progress"]["best_top1"] = 2.0  # of an epoch that this run will not reach
    torch.save(unbeaten, folder / "best.pt")
    run(None, [*SHORT, f"--run.resume={folder / 'epoch-0001.pt'}", f"--run.dir={run_dir}"])
    later = [record["val_top1"] for record in RunDirectory(run_dir).load_metrics()[1:]]
    assert best_top1(run_dir) == max(later)
    assert load_state(folder / "best.pt.old")["progress"]["best_top1"] == 2.0

    branch = tmp_path / "branch"
    run(None, [*SHORT, f"--run.resume={whole.run_dir / 'checkpoints' / 'epoch-0002.pt'}", f"--run.dir={branch}"])
    assert best_top1(branch) == RunDirectory(branch).load_metrics()[-1]["val_top1"]


def test_a_branch_that_was_killed_before_it_had_a_best_checkpoint_gets_one(whole: Whole, tmp_path: Path) -> None:
    unbeaten = load_state(whole.run_dir / "checkpoints" / "epoch-0002.pt")
    unbeaten["progress"]["best_top1"] = 2.0  # of the other run, which has that checkpoint
    torch.save(unbeaten, tmp_path / "other.pt")
    flags = [*SHORT, f"--run.dir={tmp_path / 'branch'}"]
    (cut,) = run(None, [*flags, f"--run.resume={tmp_path / 'other.pt'}"], cut_after=2)
    assert (cut.end, (tmp_path / "branch" / "checkpoints" / "best.pt").exists()) == ("cut off", False)
    (resumed,) = run(None, flags)
    assert resumed.end == "finished"
    assert best_top1(tmp_path / "branch") == RunDirectory(tmp_path / "branch").load_metrics()[-1]["val_top1"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_that_goes_back_to_an_earlier_checkpoint_forgets_the_later_ones(whole: Whole, tmp_path: Path) -> None:
    """Cut off before it has passed them, it goes on from where it was, not from what it has turned its back on."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir)
    folder = run_dir / "checkpoints"
    flags = [*SHORT, "--checkpoint.every_steps=1", f"--run.dir={run_dir}"]
    (cut,) = run(None, [*flags, f"--run.resume={folder / 'epoch-0001.pt'}"], cut_after=4)
    assert cut.end == "cut off"
    # Two are kept, and of the others nothing is lost.
    assert [path.name for path in CheckpointStore(folder).paths()] == [
        f"epoch-0001-sample-{samples:09d}.pt" for samples in (24, 32)
    ]
    assert load_state(folder / "epoch-0003.pt.old")["progress"]["samples_seen"] == 3 * SAMPLES
    left = load_state(whole.run_dir / "checkpoints" / "best.pt")["progress"]
    assert (folder / "best.pt.old").exists() == (left["best_top1"] != first_best(whole))

    (resumed,) = run(None, flags)
    assert resumed.end == "finished"
    assert [resume["samples_seen"] for resume in resumes(run_dir)] == [SAMPLES, SAMPLES + 32]
    assert_same_end(whole.outcome, resumed)
    assert numbers(run_dir) == numbers(whole.run_dir)


@pytest.mark.parametrize("samples", [20, 60])
def test_rates_follow_the_epochs_whatever_the_size_of_the_set_was_before(samples: int, tmp_path: Path) -> None:
    digits = ["--data.name=digits", "--data.kwargs={}", "--data.image_size=16", "--optim.schedule=cosine"]
    flags = [*SHORT, *digits, "--optim.lr=0.02", "--batch.per_gpu=8"]
    first, second = tmp_path / "first", tmp_path / "second"
    run(None, [*flags, "--data.train_samples=40", "--checkpoint.keep=9", f"--run.dir={first}"])
    path = first / "checkpoints" / "epoch-0001.pt"
    (branched,) = run(None, [*flags, f"--data.train_samples={samples}", f"--run.resume={path}", f"--run.dir={second}"])
    done = [1 + epoch + begin / samples for epoch in range(2) for begin in range(0, samples, 8)]
    expected = [0.02 * 0.5 * (1 + math.cos(math.pi * epochs / 3)) for epochs in done]
    assert [step.lr for step in branched.steps] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["sharded", "periodic"])
def test_an_epoch_without_evaluation_loses_nothing_of_the_moving_average(
    mode: str, two_ranks: Any, tmp_path: Path
) -> None:
    """Each rank's own until an evaluation pools it: the ranks' batch-norm statistics, and weights that drift."""
    flags = [
        *SHORT,
        "--optim.ema_decay=0.9",
        "--train.evaluate_every=2",
        f"--replicas.mode={mode}",
        "--localized.lr=0.1",
    ]
    flags += ["--selection.kind=fixed", "--selection.boundary=2", "--batch.per_gpu=4", "--replicas.every=3"]
    whole = run(two_ranks, [*flags, "--checkpoint.keep=9", f"--run.dir={tmp_path / 'whole'}"])
    path = tmp_path / "whole" / "checkpoints" / "epoch-0001.pt"
    assert numbers(tmp_path / "whole")[0]["val_top1"] is None
    branched = run(two_ranks, [*flags, f"--run.resume={path}", f"--run.dir={tmp_path / 'branch'}"])
    for a, b in zip(whole, branched, strict=True):
        assert len(a.states) == 2
        assert_same_end(a, b)


def test_a_boundary_known_in_advance_stands_from_the_first_epoch_on(tmp_path: Path) -> None:
    run(None, [*SHORT, "--localized.rule=none", f"--run.dir={tmp_path / 'plain'}"])
    path = tmp_path / "plain" / "checkpoints" / "epoch-0002.pt"
    flags = [*SHORT, "--selection.kind=fixed", "--selection.boundary=2", f"--run.dir={tmp_path / 'branch'}"]
    (branched,) = run(None, [*flags, f"--run.resume={path}"])
    assert [(record["epoch"], record["boundary"]) for record in numbers(tmp_path / "branch")] == [(2, 2)]
    (shift,) = [event for event in RunDirectory(tmp_path / "branch").load_events() if event["type"] == "shift"]
    assert (shift["boundary_from"], shift["boundary_to"]) == (0, 2)
    for step in branched.steps:
        assert not {"1.weight", "1.bias", "3.weight.momentum_buffer"} & step.moved


def test_a_moving_average_that_the_other_run_had_not_begins_with_its_weights(whole: Whole, tmp_path: Path) -> None:
    without = ["--optim.ema_decay=0", "--checkpoint.keep=9"]
    run(None, [*SHORT, *without, f"--run.dir={tmp_path / 'without'}"])
    path = tmp_path / "without" / "checkpoints" / "epoch-0002.pt"
    flags = [*SHORT, "--optim.ema_decay=0.9", "--optim.lr=1e-30", "--optim.weight_decay=0", "--localized.rule=frozen"]
    (branched,) = run(None, [*flags, f"--run.resume={path}", f"--run.dir={tmp_path / 'with'}"])
    network, average = branched.states
    # Weights stand still, and so does their average.
    for name in ("0.weight", "3.weight"):
        assert network[name] == pytest.approx(average[f"module.{name}"], rel=1e-5)


@pytest.mark.parametrize(("first", "second"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_the_state_of_another_optimizer_is_refused_before_anything_is_written(
    first: str, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(None, [*SHORT, f"--optim.name={first}", f"--run.dir={tmp_path / 'first'}"])
    path = tmp_path / "first" / "checkpoints" / "epoch-0002.pt"
    other = [f"--optim.name={second}", f"--run.resume={path}", f"--run.dir={tmp_path / 'second'}"]
    assert train.main(["--config", "quickstart", *SHORT, *other]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert f"optim.name={second}" in line
    assert not (tmp_path / "second" / "checkpoints").exists()


def test_a_batch_that_is_configured_otherwise_is_taken(whole: Whole, tmp_path: Path) -> None:
    path = whole.run_dir / "checkpoints" / "epoch-0001.pt"
    flags = [*SHORT, "--batch.per_gpu=5", "--optim.schedule=constant", f"--run.dir={tmp_path}"]
    (branched,) = run(None, [*flags, f"--run.resume={path}"], cut_after=11)
    assert {len(step.labels) for step in branched.steps} == {5}
    assert {step.lr for step in branched.steps} == {0.02}
    # Its own checkpoint, of which the same is configured, is gone on from as ever.
    (resumed,) = run(None, flags)
    assert (resumed.end, {len(step.labels) for step in resumed.steps}) == ("finished", {5})


def test_a_checkpoint_of_another_network_is_refused_in_one_line(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole.run_dir / "checkpoints" / "epoch-0001.pt"
    other = ["--data.kwargs={count: 90}", f"--run.resume={path}", f"--run.dir={tmp_path / 'other'}"]
    assert train.main(["--config", "quickstart", *SHORT, *other]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith(f"locsgd: error: run.resume: checkpoint {path} does not fit this configuration: ")
