"""Boundaries of a planned run, from the configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from locsgd_dist.config import parse_config
from locsgd_dist.localized import LayerMap, trace_layers
from locsgd_dist.planner.schedule import boundaries_per_epoch, interval_epochs


@pytest.fixture(scope="module")
def layers() -> LayerMap:
    """Eight of them, none of which recurs."""
    return trace_layers(nn.Sequential(*(nn.Linear(2, 2) for _ in range(8))), torch.zeros(1, 2))


def test_paces_by_hand(layers: LayerMap, tmp_path: Path) -> None:
    # lmax * L = 6 layers over 7 epochs. Linear, full after half of the run: 6 * e / 3.
    flags = ["--train.epochs=7", "--selection.kind=linear", "--selection.full_at=0.5", "--selection.anneal=true"]
    config = parse_config(flags)
    assert boundaries_per_epoch(config, layers) == [0, 2, 4, 6, 6, 6, 6]
    # Algorithm 1 has K = 1, and compares two epochs at least; no layer can be annealed to what it decides.
    assert boundaries_per_epoch(config, layers, "dynamic") == [0, 0, 1, 2, 3, 4, 5]
    (tmp_path / "trace.json").write_text(json.dumps([0, 3]))
    assert boundaries_per_epoch(config, layers, trace=tmp_path / "trace.json") == [0, *[3] * 6]
    assert boundaries_per_epoch(parse_config([*flags, "--localized.rule=none"]), layers) == [0] * 7


@pytest.mark.parametrize("criterion", ["update_norm", "relative_drift", "rate_normalised", "loss_plateau"])
def test_a_later_start_goes_at_the_pace_of_what_is_left(criterion: str, layers: LayerMap) -> None:
    flags = ["--train.epochs=16", "--selection.start_epoch=4", f"--selection.criterion={criterion}"]
    config = parse_config([*flags, "--selection.window=mean"])
    assert interval_epochs(config, layers) == 2  # 12 / 6
    assert boundaries_per_epoch(config, layers) == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
