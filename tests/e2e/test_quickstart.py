"""The quick start, and what a user does with its run afterwards."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launching import environment, events, metrics

from locsgd_dist.models import ModelConfig, build_model

# With pytest-xdist on one worker: it is run once.
pytestmark = pytest.mark.xdist_group("quickstart")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The bare command of the README: no configuration named, two ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "locsgd_dist.train"]
    done = command(folder, *torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "quickstart"


def test_it_learns_and_the_boundary_advances(run: Path):
    recorded = metrics(run)
    assert recorded[-1]["val_top1"] >= 0.96
    assert [epoch["epoch"] for epoch in recorded] == list(range(len(recorded)))
    shifts = events(run, "shift")
    assert len(shifts) >= 2
    assert all(shift["boundary_to"] > shift["boundary_from"] for shift in shifts)


def test_gradient_bytes_fall_with_each_shift_to_the_sgd_regions_size(run: Path):
    recorded = metrics(run)
    for before, after in itertools.pairwise(recorded):
        assert after["grad_all_reduce_bytes"] <= before["grad_all_reduce_bytes"]
        # Per step, since a larger batch makes fewer of them.
        a, b = (epoch["grad_all_reduce_bytes"] / epoch["num_steps"] for epoch in (after, before))
        assert a < b if after["boundary"] > before["boundary"] else a == b
    assert recorded[0]["grad_all_reduce_bytes"] == recorded[0]["plain_ddp_bytes"]
    assert recorded[0]["replica_sync_bytes"] == 0
    assert recorded[-1]["replica_sync_bytes"] > 0


def test_the_run_directory_is_complete(run: Path):
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "memory.csv", "report.html", "checkpoints/best.pt"):
        assert (run / name).stat().st_size > 0, name
    needed = """epoch samples_seen boundary num_layers per_gpu_batch global_batch world_size lr local_lr sign
        transition_update_norm train_loss val_loss val_top1 seconds images_per_second footprint_bytes footprint_source
        grad_all_reduce_bytes replica_sync_bytes""".split()  # noqa: SIM905
    for epoch in metrics(run):
        assert all(epoch[key] is not None for key in needed)
        assert epoch["samples_seen"] == (epoch["epoch"] + 1) * metrics(run)[0]["samples_seen"]
    assert metrics(run)[0]["footprint_source"] == "tensor_bytes"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["name"] == "digits"


def test_memory_falls_as_the_boundary_advances_and_the_batch_doubles(run: Path):
    recorded = metrics(run)
    start = recorded[0]
    at_first_batch = [epoch for epoch in recorded if epoch["per_gpu_batch"] == start["per_gpu_batch"]]
    assert at_first_batch[-1]["footprint_bytes"] < 0.6 * start["footprint_bytes"]
    assert recorded[-1]["per_gpu_batch"] >= 2 * start["per_gpu_batch"]
    assert all(epoch["footprint_bytes"] <= start["footprint_bytes"] for epoch in recorded)
    doublings = events(run, "batch")
    assert doublings
    assert all(event["per_gpu_to"] == 2 * event["per_gpu_from"] for event in doublings)


def test_evaluate_agrees_with_the_recorded_accuracy(folder: Path, run: Path):
    done = command(folder, "-m", "locsgd_dist.cli", "evaluate", str(run), "--checkpoint=newest", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["val_top1"] == pytest.approx(metrics(run)[-1]["val_top1"], abs=1e-9)
    assert result["val_loss"] == pytest.approx(metrics(run)[-1]["val_loss"], rel=1e-4)


@pytest.mark.parametrize("export_format", ["state_dict", "torch_export", "onnx"])
def test_exported_weights_work_without_the_trainer(folder: Path, run: Path, export_format: str):
    output = folder / f"model.{export_format}"
    done = command(
        folder, "-m", "locsgd_dist.cli", "export", str(run), f"--output={output}", f"--format={export_format}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    network = build_model(ModelConfig(name="resnet18", width=8), 10).eval()
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model"]
    network.load_state_dict(best, strict=True)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
    if export_format == "state_dict":
        weights = torch.load(output, weights_only=True)
        assert set(weights) == set(network.state_dict())
        assert all(torch.equal(weights[key], best[key]) for key in weights)
    elif export_format == "torch_export":
        torch.testing.assert_close(torch.export.load(output).module()(images), expected, rtol=1e-4, atol=1e-4)
    else:
        import onnx.reference

        (logits,) = onnx.reference.ReferenceEvaluator(str(output)).run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)


def test_a_finished_run_is_one_clear_line(folder: Path, run: Path):
    done = command(folder, "-m", "locsgd_dist.train")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "finished run" in line
    assert "run.dir" in line


def test_another_configuration_never_goes_on_silently(folder: Path, run: Path):
    done = command(folder, "-m", "locsgd_dist.train", "--optim.lr=0.01")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "optim.lr" in line
