"""Networks of other libraries go through a run with shifts on two ranks; their weights load into the plain network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_factories
import torch
import torchvision
from launching import Launch, environment, events, metrics

NETWORKS = {
    # Narrow: their depth is what is tried.
    "torchvision:resnet50": (64, {"width_per_group": 8}, torchvision.models.resnet50, 54),
    "torchvision:mobilenet_v2": (64, {"width_mult": 0.25}, torchvision.models.mobilenet_v2, 53),
    "tiny_factories:small_vit": (32, {}, tiny_factories.small_vit, 11),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_three_epochs_with_shifts_and_the_weights_load_into_the_plain_network(name, launch: Launch, tmp_path: Path):
    size, kwargs, plain, num_layers = NETWORKS[name]
    done = launch(
        "--model.width=null",
        f"--model.name={name}",
        f"--model.kwargs={kwargs}",
        "--data.name=tiny_factories:blobs",
        f"--data.kwargs={{size: {size}}}",
        "--data.workers=0",
        "--batch.per_gpu=2",
        "--train.epochs=3",
        "--optim.lr=0.001",
        "--selection.kind=static",
        "--run.dir=run",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    recorded = metrics(run)
    boundaries = [epoch["boundary"] for epoch in recorded]
    assert [epoch["num_layers"] for epoch in recorded] == [num_layers] * 3
    assert boundaries[0] < boundaries[1] < boundaries[2] == int(0.75 * num_layers)
    sent = [epoch["grad_all_reduce_bytes"] for epoch in recorded]
    assert sent[0] > sent[1] > sent[2] > 0
    assert len(events(run, "shift")) >= 2

    output = tmp_path / "weights.pt"
    exported = subprocess.run(
        [sys.executable, "-m", "locsgd_dist.cli", "export", str(run), "--checkpoint=newest", f"--output={output}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert exported.returncode == 0, exported.stderr[-3000:]
    weights = torch.load(output, weights_only=True)
    network = plain(num_classes=3, **kwargs)
    network.load_state_dict(weights, strict=True)
    # The SGD region's bytes, from the plain network: 12 samples, 2 ranks of 2, so three steps an epoch.
    if name != "tiny_factories:small_vit":
        full = sum(p.numel() * p.element_size() for p in network.parameters())
        assert recorded[0]["plain_ddp_bytes"] == 3 * full
