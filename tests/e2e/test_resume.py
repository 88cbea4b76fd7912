"""A run that was stopped ends as it would have ended; bad input stops all ranks with one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launching import Launch, events, metrics

TINY = (
    "--model.width=null",
    "--model.name=tiny_factories:small_vit",
    "--data.name=tiny_factories:blobs",
    "--data.kwargs={train: 30, val: 7}",
    "--data.workers=0",
    "--batch.per_gpu=4",
    "--train.epochs=5",
    "--train.deterministic=true",
    "--optim.lr=0.01",
    "--localized.lr=0.001",
    "--selection.kind=static",
    "--checkpoint.keep=9",
)
GROWING = (
    "--batch.policy=halving",
    "--batch.memory_budget=1GiB",
    "--batch.min_steps=1",
    "--batch.interval_epochs=2",
    "--batch.lr_ramp_epochs=2.5",
)
TIMES = {"seconds", "cpu_seconds", "eval_seconds", "images_per_second", "footprint_bytes"}


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in TIMES}


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_cut_off_after_an_epoch_ends_bit_equal(nproc: int, launch: Launch, tmp_path: Path):
    whole = launch(*TINY, *GROWING, "--run.dir=whole", nproc=nproc)
    assert whole.returncode == 0, whole.stderr[-3000:]
    # What a kill during the fourth epoch leaves: three checkpoints, and a line of the fourth epoch already recorded.
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for name in ("epoch-0004.pt", "epoch-0005.pt", "best.pt"):
        (cut / "checkpoints" / name).unlink()
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])

    resumed = launch(*TINY, *GROWING, "--run.dir=cut", nproc=nproc)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [without_times(m) for m in metrics(cut)] == [without_times(m) for m in metrics(tmp_path / "whole")]
    # The boundary moved and the batch grew on both sides of the cut, which lies inside a learning-rate ramp.
    assert len({m["boundary"] for m in metrics(cut)[:3]}) > 1
    assert len({m["per_gpu_batch"] for m in metrics(cut)[:3]}) > 1
    assert metrics(cut)[2]["per_gpu_batch"] < metrics(cut)[4]["per_gpu_batch"]
    (resume,) = events(cut, "resume")
    assert (resume["epoch"], resume["samples_seen"]) == (3, 90)
    ends = [torch.load(run / "checkpoints" / "epoch-0005.pt") for run in (tmp_path / "whole", cut)]
    for name, weight in ends[0]["model"].items():
        assert torch.equal(weight, ends[1]["model"][name]), name


def test_starting_afresh_moves_the_old_run_aside(launch: Launch, tmp_path: Path):
    for _ in range(2):
        done = launch(*TINY, "--train.epochs=1", "--run.dir=r", "--run.resume=never", nproc=0)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(tmp_path / "r")) == len(metrics(tmp_path / "r.old-1")) == 1


def test_bad_input_under_torchrun_is_said_once_and_nobody_hangs(launch: Launch, tmp_path: Path):
    done = launch("--selection.lmax=1.4", "--run.dir=r", nproc=2)
    assert done.returncode == 1  # torchrun's own code for a failed rank
    said = [line for line in done.stderr.splitlines() if line.startswith("locsgd: error:")]
    assert said == ["locsgd: error: selection.lmax must lie in [0, 1], got 1.4"]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "r").exists()


def test_what_only_the_built_network_can_tell_is_one_line_too(launch: Launch, tmp_path: Path):
    done = launch(*TINY, "--selection.kind=fixed", "--selection.boundary=99", "--run.dir=r", nproc=0)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "selection.boundary must be at most" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("resume", "where"), [("auto", "r"), ("never", "r.old-1")])
def test_a_refused_start_leaves_an_earlier_run_whole_where_it_was_asked_to_be(
    resume: str, where: str, launch: Launch, tmp_path: Path
):
    earlier = tmp_path / "r"
    earlier.mkdir()
    (earlier / "metrics.jsonl").write_text("")
    refused = (*TINY, "--selection.kind=fixed", "--selection.boundary=99", "--run.dir=r", f"--run.resume={resume}")
    assert launch(*refused, nproc=0).returncode == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("r")] == [where]
    assert [path.name for path in (tmp_path / where).iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("mode", ["all_reduce", "periodic"])
def test_other_replica_modes_with_accumulation_and_averaging(mode: str, launch: Launch, tmp_path: Path):
    done = launch(
        *TINY,
        f"--replicas.mode={mode}",
        "--replicas.every=2",
        "--train.gradient_accumulation=2",
        "--optim.ema_decay=0.9",
        "--distributed.gradient_compression=bf16",
        "--train.precision=bf16",
        "--run.tensorboard=true",
        "--run.dir=r",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recorded = metrics(tmp_path / "r")
    assert recorded[-1]["replica_sync_bytes"] > 0
    assert recorded[0]["global_batch"] == 16
    # 30 samples in steps of 16: two steps, in half the bytes of fp32.
    assert recorded[0]["grad_all_reduce_bytes"] * 2 == recorded[0]["plain_ddp_bytes"]
    assert "ema_val_top1" in recorded[-1]
    assert list((tmp_path / "r" / "tensorboard").iterdir())
