"""A rank is killed, then the machine asks for the job to leave: the run ends as it would have ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import Launch, events, metrics
from test_resume import GROWING, TINY, without_times

FLAGS = (*TINY, *GROWING, "--data.name=tiny_factories:faulty_blobs", "--checkpoint.every_steps=1", "--train.epochs=4")


def test_killed_and_preempted_inside_epochs(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = launch(*FLAGS, "--run.dir=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]

    # Rank 1 reads 15 images an epoch: killed in the second, the job asked to leave in the second or third.
    monkeypatch.setenv("TINY_FAULTS", "kill@22,term@9")
    left = launch(*FLAGS, "--run.dir=r", max_restarts=1)
    run = tmp_path / "r"
    marker = json.loads((run / "preempted").read_text())
    assert marker["signal"] == "SIGTERM"
    assert "asked to leave" in left.stderr
    assert [event["type"] for event in events(run) if event["type"] in ("resume", "preempt")] == ["resume", "preempt"]
    assert len(metrics(run)) == marker["epoch"] < 4

    monkeypatch.delenv("TINY_FAULTS")
    resumed = launch(*FLAGS, "--run.dir=r")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert not (run / "preempted").exists()
    first, second = events(run, "resume")
    assert 30 <= first["samples_seen"] < 60
    assert second["samples_seen"] == marker["samples_seen"] > first["samples_seen"]
    assert [without_times(m) for m in metrics(run)] == [without_times(m) for m in metrics(tmp_path / "whole")]
    ends = [torch.load(folder / "checkpoints" / "epoch-0004.pt") for folder in (tmp_path / "whole", run)]
    for name, weight in ends[0]["model"].items():
        assert torch.equal(weight, ends[1]["model"][name]), name
