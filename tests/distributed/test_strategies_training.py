"""Comparison strategies in the trainer: ranks stay equal, and a run cut off inside an epoch ends as it would have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import numbers, run
from plain_reference import assert_bit_equal

from locsgd_dist.checkpoint import CheckpointStore, load_state
from locsgd_dist.inference import evaluate_trained, export_trained, load_trained
from locsgd_dist.memory import trace
from locsgd_dist.recording import RunDirectory

FLAGS = [
    "--data.name=digits",
    "--data.train_samples=70",
    "--data.image_size=16",
    "--model.name=resnet18",
    "--model.width=4",
    "--batch.per_gpu=8",
    "--batch.policy=fixed",
    "--train.epochs=2",
    "--train.device=cpu",
    "--train.deterministic=true",
    "--optim.lr=0.1",
    "--optim.ema_decay=0.9",
    "--run.console=quiet",
    "--run.report_every=null",
    "--monitor.trace_hz=0",
]
#: A threshold at which a few dozen steps suffice for channels to die.
PRUNING = ["--pruning.every_epochs=1", "--pruning.lasso_ratio=0.5", "--pruning.threshold=0.32"]
SHIFT = ["--selection.kind=fixed", "--selection.boundary=6", "--selection.start_epoch=1"]
HEBBIAN = ["--localized.rule=hebbian", "--localized.lr=0.001", "--replicas.every=4", *SHIFT]
CASES = {
    "stochastic depth": ["--localized.rule=none", "--stochastic_depth.survival=0.5"],
    "stochastic depth, localized": [*HEBBIAN, "--stochastic_depth.survival=0.5"],
    "pruning": ["--localized.rule=none", *PRUNING, "--train.gradient_accumulation=2"],
    "pruning, localized": [*HEBBIAN, *PRUNING],
    "freezing, held": ["--localized.rule=frozen", "--localized.norm_statistics=held", *SHIFT],
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_stay_equal_and_a_cut_off_run_goes_on(case: str, two_ranks: Any, tmp_path: Path) -> None:
    flags = [*FLAGS, *CASES[case]]
    whole = run(two_ranks, [*flags, f"--run.dir={tmp_path / 'whole'}"])
    for states in zip(*(of_rank for *_, of_rank in whole), strict=True):
        assert_bit_equal(states)

    assert_goes_on(two_ranks, flags, tmp_path, whole)

    recorded = numbers(tmp_path / "whole")
    prunes = [event for event in RunDirectory(tmp_path / "whole").load_events() if event["type"] == "prune"]
    if "pruning" in case:
        assert prunes[0]["epoch"] == 0, "the run must resume a network that is pruned already"
        for event in prunes:
            assert event["num_parameters_to"] < event["num_parameters_from"]
            assert event["forward_macs_to"] < event["forward_macs_from"]
        assert recorded[1]["num_parameters"] == prunes[0]["num_parameters_to"]
        assert recorded[1]["footprint_bytes"] < recorded[0]["footprint_bytes"]
    else:
        assert not prunes
        assert len({epoch["num_parameters"] for epoch in recorded}) == 1
    if case == "freezing, held":
        assert_held(tmp_path / "whole")
    if "localized" not in case:
        assert_loads(tmp_path / "whole", recorded[-1], whole[0][2][0])


@pytest.mark.parametrize("case", ["stochastic depth", "pruning, localized"])
def test_the_batch_grows_and_a_report_is_drawn(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last report shows the trace however short the run is.
    monkeypatch.setattr(trace, "WRITE_SECONDS", 3600.0)
    growing = ["--batch.policy=halving", "--batch.memory_budget=1GiB", "--batch.min_steps=1", "--batch.max_per_gpu=16"]
    shown = ["--run.report_every=0", "--monitor.trace_hz=20", f"--run.dir={tmp_path}"]
    run(None, [*FLAGS, *CASES[case], *growing, "--batch.interval_epochs=1", *shown])
    assert [(epoch["per_gpu_batch"], epoch["num_steps"]) for epoch in numbers(tmp_path)] == [(8, 9), (16, 5)]
    events = [event["type"] for event in RunDirectory(tmp_path).load_events()]
    assert events.count("batch") == 1
    html = (tmp_path / "report.html").read_text()
    figures = re.findall(r'<figure id="([^"]+)"', html)
    assert {"footprint", "boundary", "accuracy", "loss", "memory-trace"} <= set(figures)
    assert "batch per GPU 8 → 16" in html
    assert (events.count("prune") > 0) == ("removal of channels" in html) == ("pruning" in case)


def assert_goes_on(two_ranks: Any, flags: list[str], folder: Path, whole: list[Any]) -> None:
    """The same run, cut off two steps into its second epoch, ends as the whole one in ``folder / "whole"``."""
    steps = numbers(folder / "whole")[0]["num_steps"]
    cut = [*flags, "--checkpoint.every_steps=1", f"--run.dir={folder / 'cut'}"]
    assert {end for end, *_ in run(two_ranks, cut, cut_after=steps + 2)} == {"cut off"}
    resumed = run(two_ranks, cut)
    assert numbers(folder / "cut") == numbers(folder / "whole")
    for a, b in zip(whole[0][2], resumed[0][2], strict=True):
        assert_bit_equal([a, b])
    (resume,) = [event for event in RunDirectory(folder / "cut").load_events() if event["type"] == "resume"]
    assert 70 < resume["samples_seen"] < 140


def assert_held(run_dir: Path) -> None:
    """Statistics that were held in the second epoch are in the last checkpoint as after the first."""
    states = [load_state(path)["model"] for path in CheckpointStore(run_dir / "checkpoints", 2).paths()]
    held = [name for name in states[0] if name.startswith(("bn1.running", "layer1.0.bn1.running"))]
    assert len(held) == 4
    for name in held:
        assert torch.equal(states[0][name], states[1][name]), name
    assert not torch.equal(states[0]["layer4.1.bn2.running_mean"], states[1]["layer4.1.bn2.running_mean"])


def assert_loads(run_dir: Path, last: dict[str, Any], weights: dict[str, Any]) -> None:
    """Evaluation and export of the run give what the trainer saw."""
    trained = load_trained(run_dir, "newest")
    assert evaluate_trained(trained)["val_loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    averaged = load_trained(run_dir, "newest", ema=True)
    assert evaluate_trained(averaged)["val_loss"] == pytest.approx(last["ema_val_loss"], rel=1e-4)

    images = torch.rand(2, *trained.input_shape)
    export_trained(trained, run_dir / "network.pt2", "torch_export")
    program = torch.export.load(run_dir / "network.pt2").module()
    torch.testing.assert_close(program(images), trained.model(images), rtol=1e-4, atol=1e-5)
    export_trained(trained, run_dir / "network.pt")
    exported = torch.load(run_dir / "network.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in exported.items()} == {
        name: value.shape for name, value in weights.items()
    }
