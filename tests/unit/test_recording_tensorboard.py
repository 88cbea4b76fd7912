"""The TensorBoard sink, read back by TensorBoard itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from locsgd_dist.recording import Recorder, RunConfig

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

CONFIG = RunConfig(console="quiet", report_every=0, tensorboard=True)


def record(run: Path, epochs: range, accuracy: float, resume_after: int | None = None) -> None:
    with Recorder.open(run, CONFIG, rank=0, config_yaml="") as recorder:
        if resume_after is not None:
            recorder.truncate_to(resume_after)
        for epoch in epochs:
            recorder.epoch(
                {
                    "epoch": epoch,
                    "train_loss": 1.0 / (epoch + 1),
                    "val_top1": accuracy,
                    "ema_val_top1": accuracy + 0.25,
                    "val_loss": math.nan,
                    "boundary": 2 * epoch,
                    "footprint_bytes": 2**30,
                    "footprint_source": "nvml",
                    "grad_all_reduce_bytes": 1000,
                    "layer_names": ["conv1", "fc"],
                    "layer_norm": [1.5, None],
                }
            )


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    reader = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    return {tag: [(s.step, s.value) for s in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_scalars_over_epochs(tmp_path: Path) -> None:
    record(tmp_path / "run", range(2), accuracy=0.5)
    assert scalars(tmp_path / "run") == {
        "train/loss": [(0, 1.0), (1, 0.5)],
        "val/top1": [(0, 0.5), (1, 0.5)],
        "val/ema_top1": [(0, 0.75), (1, 0.75)],
        "run/boundary": [(0, 0.0), (1, 2.0)],
        "memory/footprint_bytes": [(0, 2.0**30), (1, 2.0**30)],
        "traffic/grad_all_reduce_bytes": [(0, 1000.0), (1, 1000.0)],
        "layer_norm/conv1": [(0, 1.5), (1, 1.5)],
    }


def test_a_resumed_run_shows_each_epoch_once(tmp_path: Path) -> None:
    record(tmp_path / "run", range(4), accuracy=0.25)
    record(tmp_path / "run", range(2, 5), accuracy=0.5, resume_after=1)
    assert scalars(tmp_path / "run")["val/top1"] == [(0, 0.25), (1, 0.25), (2, 0.5), (3, 0.5), (4, 0.5)]


def test_off_by_default(tmp_path: Path) -> None:
    with Recorder.open(tmp_path, RunConfig(console="quiet", report_every=0), rank=0, config_yaml="") as recorder:
        recorder.epoch({"epoch": 0, "train_loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()
