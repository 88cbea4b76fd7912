"""One rank of two runs out of memory, really: the host's allocator refuses. The run ends all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import Launch, events, metrics

GROWING = (
    "--model.width=null",
    "--model.name=tiny_factories:greedy",
    "--data.name=tiny_factories:blobs",
    "--data.kwargs={train: 42, val: 9}",
    "--data.workers=0",
    "--batch.per_gpu=4",
    "--batch.memory_budget=1GiB",
    "--batch.min_steps=1",
    "--batch.interval_epochs=1",
    "--batch.max_per_gpu=8",
    "--train.epochs=4",
    "--train.deterministic=true",
    "--optim.lr=0.01",
    "--selection.kind=static",
    "--run.dir=r",
)


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_in_the_middle_of_a_step_it_goes_on_with_the_last_batch_that_worked(where, launch: Launch, tmp_path: Path):
    done = launch(*GROWING, "--batch.policy=halving", f"--model.kwargs={{where: {where}}}", max_restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 1 ran out of memory in epoch 1 at a batch of 8 per GPU" in done.stderr
    recorded = metrics(tmp_path / "r")
    assert [epoch["epoch"] for epoch in recorded] == [0, 1, 2, 3]
    assert [epoch["samples_seen"] for epoch in recorded] == [42, 84, 126, 168]
    assert [epoch["per_gpu_batch"] for epoch in recorded] == [4, 4, 4, 4]
    assert recorded[-1]["train_loss"] < recorded[0]["train_loss"]
    (incident,) = events(tmp_path / "r", "oom")
    assert (incident["per_gpu"], incident["oom_rank"]) == (8, 1)
    batches = [(b["per_gpu_from"], b["per_gpu_to"]) for b in events(tmp_path / "r", "batch")]
    assert batches == [(4, 8), (8, 4)]
    assert len(events(tmp_path / "r", "resume")) == 1


def test_in_the_trial_step_nothing_is_lost_and_no_bit_changes(launch: Launch, tmp_path: Path):
    tried = launch(*GROWING, "--batch.policy=halving", "--model.kwargs={where: trial}")
    assert tried.returncode == 0, tried.stderr[-3000:]
    fixed = launch(*GROWING, "--batch.policy=fixed", "--model.kwargs={where: trial}", "--run.dir=fixed")
    assert fixed.returncode == 0, fixed.stderr[-3000:]
    keys = ("train_loss", "val_loss", "val_top1", "layer_norm", "lr", "local_lr", "per_gpu_batch", "samples_seen")
    for ours, theirs in zip(metrics(tmp_path / "r"), metrics(tmp_path / "fixed"), strict=True):
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    assert len(events(tmp_path / "r", "oom")) == 1  # a size that failed is not tried again
    assert events(tmp_path / "r", "batch") == []


def test_at_the_first_batch_it_is_one_clear_line(launch: Launch, tmp_path: Path):
    done = launch(*GROWING, "--batch.per_gpu=8", "--model.kwargs={where: forward}", max_restarts=1)
    assert done.returncode == 1
    said = {line for line in done.stderr.splitlines() if line.startswith("locsgd: error:")}
    assert len(said) == 1
    assert "lower batch.per_gpu" in said.pop()
