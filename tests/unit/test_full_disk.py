"""A disk that is full costs checkpoints and reports, never a line of the records; at its end the run says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from file_limits import files_of_at_most

from locsgd_dist import saving
from locsgd_dist.config import parse_config
from locsgd_dist.recording import Recorder, RunConfig, RunDirectory
from locsgd_dist.trainer import Trainer


def test_lines_that_did_not_fit_are_written_once_there_is_room(tmp_path: Path) -> None:
    config = RunConfig(console="quiet", report_every=0)
    recorder = Recorder.open(tmp_path, config, rank=0, config_yaml="train: {epochs: 9}\n")
    recorder.epoch({"epoch": 0, "note": "a" * 300})
    with files_of_at_most(500):
        recorder.epoch({"epoch": 1, "note": "b" * 300})  # half of it would fit
        recorder.event("shift", epoch=1, samples_seen=20)
        assert [m["epoch"] for m in RunDirectory(tmp_path).load_metrics()] == [0]
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    recorder.epoch({"epoch": 2})
    recorder.close()
    assert [m["epoch"] for m in RunDirectory(tmp_path).load_metrics()] == [0, 1, 2]
    assert [e["type"] for e in RunDirectory(tmp_path).load_events()] == ["shift"]


def test_a_run_that_cannot_save_goes_on_to_its_end_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_PAUSE_SECONDS", 0.0)
    flags = [
        "--data.name=digits",
        "--data.train_samples=60",
        "--data.image_size=16",
        "--model.name=resnet18",
        "--model.width=4",
        "--train.epochs=2",
        "--train.device=cpu",
        "--run.console=quiet",
        "--run.report_every=null",
        f"--run.dir={tmp_path}",
    ]
    with (
        files_of_at_most(50_000),
        Trainer(parse_config(["--config", "quickstart", *flags])) as trainer,
        pytest.raises(saving.NotSavedError, match="could not be saved: File too large"),
    ):
        trainer.fit()
    directory = RunDirectory(tmp_path)
    assert [m["epoch"] for m in directory.load_metrics()] == [0, 1]
    warnings = [e["message"] for e in directory.load_events() if e["type"] == "warning"]
    assert [w.split(";")[0] for w in warnings if "checkpoint" in w] == [
        f"checkpoint epoch-000{n}.pt could not be written: File too large" for n in (1, 2, 2)
    ]
    assert list(directory.checkpoints.iterdir()) == []
