"""A run cut off in the middle of an epoch ends as it would have ended, bit by bit, on as many ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import numbers, run
from plain_reference import assert_bit_equal

from locsgd_dist.recording import RunDirectory

FLAGS = [
    "--model.name=interrupted_runs:small_network",
    "--model.width=null",
    "--data.name=interrupted_runs:numbered",
    "--data.kwargs={count: 70}",
    "--data.workers=0",
    "--train.epochs=4",
    "--train.device=cpu",
    "--train.deterministic=true",
    "--optim.ema_decay=0.9",
    "--optim.lr=0.02",
    "--localized.rule=hebbian",
    # The boundary moves after the first and the third epoch, the batch grows after the second.
    "--selection.kind=static",
    "--selection.lmax=0.75",
    "--batch.per_gpu=4",
    "--batch.policy=halving",
    "--batch.memory_budget=1GiB",
    "--batch.min_steps=1",
    "--batch.interval_epochs=2",
    "--batch.max_per_gpu=8",
    "--batch.lr_ramp_epochs=1.7",
    "--run.console=quiet",
    "--run.report_every=null",
    "--monitor.trace_hz=0",
]
ALIGNED = ["--localized.alignment_every=1", "--localized.weak_supervision=alignment"]
CASES = {
    # ranks, replicas, checkpoint every n steps, cut off after so many
    "one rank": (1, ["--localized.refresh_every=2", "--localized.refresh_growth=3"], 7, 23),
    "inside a window": (
        2,
        ["--replicas.every=4", "--localized.update_every=2", "--localized.alignment_every=3"],
        5,
        17,
    ),
    "while replicas drift": (2, ["--replicas.mode=periodic", "--replicas.every=3"], 5, 22),
    "all reduced": (2, ["--replicas.mode=all_reduce", "--localized.refresh_every=3", *ALIGNED], 5, 17),
    "with a worker": (1, ["--data.workers=1"], 5, 17),
    "four ranks": (4, ["--replicas.every=3", "--localized.refresh_every=4", "--localized.refresh_carry=true"], 4, 12),
}


def pool_of(request: pytest.FixtureRequest, ranks: int) -> Any:
    """The pool of so many ranks; None for one, which needs none."""
    return None if ranks == 1 else request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks])


@pytest.mark.parametrize("case", CASES)
def test_cut_off_inside_an_epoch(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ranks, flags, every, cut_after = CASES[case]
    pool = pool_of(request, ranks)
    whole = run(pool, [*FLAGS, *flags, f"--run.dir={tmp_path / 'whole'}"])
    assert {rank.end for rank in whole} == {"finished"}

    cut = [*FLAGS, *flags, f"--checkpoint.every_steps={every}", f"--run.dir={tmp_path / 'cut'}"]
    assert {rank.end for rank in run(pool, cut, cut_after=cut_after)} == {"cut off"}
    resumed = run(pool, cut)
    assert {rank.end for rank in resumed} == {"finished"}

    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    for a, b in zip(whole, resumed, strict=True):
        for states in zip(a.states, b.states, strict=True):
            assert_bit_equal(states)
    events = RunDirectory(tmp_path / "cut").load_events()
    (resume,) = [event for event in events if event["type"] == "resume"]
    assert resume["samples_seen"] % 70 != 0
    recorded = numbers(tmp_path / "whole")
    assert len({epoch["boundary"] for epoch in recorded}) > 1
    assert {epoch["per_gpu_batch"] for epoch in recorded} == {4, 8}


def test_a_signal_to_one_rank_makes_all_of_them_leave(two_ranks: Any, tmp_path: Path) -> None:
    flags = [*FLAGS, "--replicas.every=4", "--train.epochs=2", "--batch.policy=fixed"]
    whole = run(two_ranks, [*flags, f"--run.dir={tmp_path / 'whole'}"])
    flags.append(f"--run.dir={tmp_path / 'left'}")
    # After the ninth and last step of the first epoch: the answer to what is asked there comes in its evaluation.
    left = run(two_ranks, flags, signal_after=9, only_rank=1)
    assert [rank.end for rank in left] == ["preempted", "preempted"]
    assert [len(rank.steps) for rank in left] == [9, 9]
    directory = RunDirectory(tmp_path / "left")
    marker = json.loads(directory.preempted.read_text())
    assert (marker["samples_seen"], marker["epoch"], marker["signal"]) == (70, 0, "SIGUSR1")
    assert directory.load_metrics() == []
    resumed = run(two_ranks, flags)
    assert {rank.end for rank in resumed} == {"finished"}
    assert not directory.preempted.exists()
    assert numbers(tmp_path / "left") == numbers(tmp_path / "whole")
    assert_bit_equal([whole[0].states[1], resumed[0].states[1]])
    assert [event["type"] for event in directory.load_events()][:3] == ["checkpoint", "preempt", "resume"]


@pytest.mark.parametrize("keep", ["per_gpu", "global"])
def test_another_number_of_ranks_takes_over_inside_an_epoch(
    keep: str, two_ranks: Any, four_ranks: Any, tmp_path: Path
) -> None:
    flags = [
        *FLAGS,
        "--data.kwargs={count: 131}",
        "--train.epochs=2",
        "--batch.policy=fixed",
        "--optim.schedule=constant",
        "--selection.kind=fixed",
        "--selection.boundary=2",
        "--replicas.every=3",
        "--batch.lr_ramp_epochs=0",
        "--batch.max_per_gpu=16",
        "--checkpoint.every_steps=1",
        f"--elastic.keep={keep}",
        f"--run.dir={tmp_path}",
    ]
    # Two updates wait for their exchange when the four ranks stop.
    parts = [run(four_ranks, flags, cut_after=2), run(two_ranks, flags, cut_after=3), run(None, flags)]
    assert [part[0].end for part in parts] == ["cut off", "cut off", "finished"]
    per_gpu = {"per_gpu": [4, 4, 4], "global": [4, 8, 16]}[keep]
    rates = {"per_gpu": [0.02, 0.01, 0.005], "global": [0.02, 0.02, 0.02]}[keep]
    seen: list[int] = []
    for part, size, rate in zip(parts, per_gpu, rates, strict=True):
        assert {len(step.labels) for rank in part for step in rank.steps[:2]} == {size}
        assert [rank.steps[0].lr for rank in part] == pytest.approx([rate] * len(part))
        seen += [label for rank in part for step in rank.steps for label in step.labels]
    first, second = seen[:131], seen[131:]
    assert sorted(first) == sorted(second) == list(range(131))
    recorded = numbers(tmp_path)
    assert [epoch["samples_seen"] for epoch in recorded] == [131, 262]
    assert [epoch["world_size"] for epoch in recorded] == [1, 1]
    resumes = [event for event in RunDirectory(tmp_path).load_events() if event["type"] == "resume"]
    assert [(e["world_size_before"], e["world_size"]) for e in resumes] == [(4, 2), (2, 1)]


def test_a_save_that_falls_into_an_evaluation_is_made_up_for(tmp_path: Path) -> None:
    """Timed saves are due all the time here, so also in evaluations; the ends of later epochs leave none."""
    flags = ["--optim.lr=1e-12", "--optim.ema_decay=0", "--localized.rule=none", "--checkpoint.every_epochs=100"]
    run_dir = tmp_path / "run"
    run(None, [*FLAGS, *flags, "--checkpoint.every_minutes=1e-9", "--checkpoint.keep=1000", f"--run.dir={run_dir}"])
    saved = {path.name for path in (run_dir / "checkpoints").iterdir()}
    for epoch in range(4):
        assert any(name.startswith(f"epoch-{epoch:04d}-sample-") for name in saved), epoch
