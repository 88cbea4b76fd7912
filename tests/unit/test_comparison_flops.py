"""Operations of whole runs against torch's own counter of real steps, and against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison_runs import write_run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from locsgd_dist.baselines.stochastic_depth import droppable_blocks, with_droppable_blocks
from locsgd_dist.config import Config, parse_config
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.models import build_model
from locsgd_dist.reporting.comparison.flops import FlopCounter
from locsgd_dist.reporting.comparison.loading import load_run

WIDE, HIDDEN, CLASSES = 3 * 32 * 32, 8, 10
FIRST, SECOND = WIDE * HIDDEN, HIDDEN * CLASSES  # multiply-adds per image of the two layers


def two_layers(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(WIDE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes))


def count(path: Path, boundary: int | Sequence[int] = 0, num_epochs: int = 1, **options: Any) -> list[float]:
    run = load_run(write_run(path, [0.5] * num_epochs, boundary=boundary, **options))
    per_epoch: list[float] = FlopCounter([run]).per_epoch(run).tolist()
    return per_epoch


def counted_by_torch(model: nn.Module, learner: LocalizedLearner | None, batch: int, num_batches: int) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(num_batches):
            F.cross_entropy(model(torch.randn(batch, 3, 32, 32)), torch.zeros(batch, dtype=torch.long)).backward()
            if learner is not None:
                learner.apply()
    total: int = counter.get_total_flops()
    return total


@pytest.mark.parametrize("name", ["resnet18", "vgg13"])
def test_a_whole_run_equals_torchs_count_of_its_steps(tmp_path: Path, name: str) -> None:
    boundaries = [0, 1, 6, 8]
    model = build_model(parse_config([f"--model.name={name}", "--model.width=4"]).model, CLASSES)
    learner = LocalizedLearner(model, torch.zeros(1, 3, 32, 32), rule="hebbian")
    expected = []
    for boundary in boundaries:
        learner.advance(boundary)
        expected.append(counted_by_torch(model, learner, batch=2, num_batches=2))
    settings = {"model.name": name, "localized.rule": "hebbian"}
    assert count(tmp_path / "run", boundaries, 4, images=4, settings=settings) == expected


MLP = {"model.name": f"{__name__}:two_layers", "model.width": None}


@pytest.mark.parametrize(
    ("boundary", "settings", "fields", "macs"),
    [
        # the first layer's input needs no gradient
        (0, {"localized.rule": "none"}, {}, (FIRST + SECOND) + FIRST + 2 * SECOND),
        # nothing before the second layer learns by SGD, so its input gradient goes too
        (1, {"localized.rule": "frozen"}, {}, (FIRST + SECOND) + SECOND),
        (1, {"localized.rule": "hebbian"}, {}, (FIRST + SECOND) + SECOND + FIRST),
        (1, {"localized.rule": "hebbian", "localized.batch_fraction": 0.25}, {}, (FIRST + SECOND) + SECOND + FIRST / 4),
        # the draw of a random direction is no product
        (1, {"localized.rule": "random"}, {}, (FIRST + SECOND) + SECOND),
        # an owner updates its layers from its share of the batch
        (1, {"localized.rule": "hebbian"}, {"world_size": 4}, (FIRST + SECOND) + SECOND + FIRST / 4),
        (
            1,
            {"localized.rule": "hebbian", "replicas.mode": "all_reduce"},
            {"world_size": 4},
            (FIRST + SECOND) + SECOND + FIRST,
        ),
        (2, {"localized.rule": "hebbian"}, {}, 2 * (FIRST + SECOND)),
        # every second step backpropagates through everything, after a second pass through the region
        (
            1,
            {"localized.rule": "frozen", "localized.refresh_every": 2},
            {"num_steps": 4, "num_refresh_steps": 2},
            (FIRST + SECOND) + (SECOND + FIRST + 2 * SECOND + FIRST) / 2,
        ),
        (
            1,
            {"localized.rule": "hebbian", "localized.refresh_every": 4, "localized.refresh_recompute": False},
            {"num_steps": 10, "num_refresh_steps": 3},
            (FIRST + SECOND) + 0.7 * (SECOND + FIRST) + 0.3 * (FIRST + 2 * SECOND),
        ),
        # an update in every fourth step: as counted, and as configured where no count was recorded
        (
            1,
            {"localized.rule": "hebbian", "localized.update_every": 4},
            {"num_steps": 10, "num_update_steps": 2},
            (FIRST + SECOND) + SECOND + 0.2 * FIRST,
        ),
        (1, {"localized.rule": "hebbian", "localized.update_every": 4}, {}, (FIRST + SECOND) + SECOND + FIRST / 4),
        # every other step is a refresh step, every other one of the rest computes an update
        (
            1,
            {
                "localized.rule": "hebbian",
                "localized.update_every": 2,
                "localized.refresh_every": 2,
                "localized.refresh_recompute": False,
            },
            {},
            (FIRST + SECOND) + 0.25 * FIRST + 0.5 * SECOND + 0.5 * (FIRST + 2 * SECOND),
        ),
        # half of each refresh batch backpropagates, the other half computes the update, as all of the other steps do
        (
            1,
            {"localized.rule": "hebbian", "localized.refresh_every": 2, "localized.refresh_fraction": 0.5},
            {"num_steps": 4, "num_refresh_steps": 2, "num_update_steps": 4},
            (FIRST + SECOND) + 0.75 * (SECOND + FIRST) + 0.25 * (FIRST + 2 * SECOND + FIRST),
        ),
        # a measured step backpropagates through everything, its update is computed anyway
        (
            1,
            {"localized.rule": "hebbian", "localized.alignment_every": 5},
            {"num_steps": 10, "num_update_steps": 10, "num_alignment_steps": 2},
            (FIRST + SECOND) + SECOND + FIRST + 0.2 * (FIRST + SECOND + FIRST),
        ),
        # in a refresh step measuring costs the update alone
        (
            1,
            {"localized.rule": "hebbian", "localized.refresh_every": 2, "localized.alignment_every": 2},
            {"num_steps": 8, "num_refresh_steps": 4, "num_update_steps": 4, "num_alignment_steps": 2},
            (FIRST + SECOND) + SECOND + 0.5 * FIRST + 0.5 * (FIRST + SECOND + FIRST) + 0.25 * FIRST,
        ),
        # Oja: outputs with outputs for each image, their sum with the weight for each batch of 64
        (1, {"localized.rule": "oja"}, {}, (FIRST + SECOND) + SECOND + FIRST + HIDDEN**2 + HIDDEN * FIRST / 64),
        # of 30 of the 100 images the first layer's output was kept; the boundary lies behind the cut
        (
            2,
            {"localized.rule": "frozen"},
            {"num_kept_layers": 1, "num_kept_samples": 30},
            0.7 * FIRST + SECOND,
        ),
        (1, {"localized.rule": "frozen"}, {"num_kept_layers": 0, "num_kept_samples": 0}, (FIRST + SECOND) + SECOND),
        (
            1,
            {"localized.rule": "oja", "localized.batch_fraction": 0.5},
            {"world_size": 2, "per_gpu_batch": 16},
            (FIRST + SECOND) + SECOND + (0.5 * (FIRST + HIDDEN**2) + HIDDEN * FIRST / 16) / 2,
        ),
    ],
)
def test_closed_form_of_two_layers(
    tmp_path: Path, boundary: int, settings: dict[str, Any], fields: dict[str, Any], macs: float
) -> None:
    (flops,) = count(tmp_path / "run", boundary, images=100, settings=MLP | settings, every_epoch=fields)
    assert flops == pytest.approx(2 * 100 * macs)


def test_a_pruned_network_counts_by_the_share_of_its_forward_pass_that_is_left(tmp_path: Path) -> None:
    whole = FIRST + SECOND
    pruning = MLP | {"localized.rule": "none", "pruning.every_epochs": 1}
    (flops,) = count(tmp_path / "half", settings=pruning, every_epoch={"forward_macs": whole / 2})
    assert flops == pytest.approx(2 * 100 * (2 * FIRST + 3 * SECOND) / 2)
    assert count(tmp_path / "unknown", settings=pruning) != count(
        tmp_path / "whole", settings=pruning | {"pruning.every_epochs": 0}
    )
    assert torch.tensor(count(tmp_path / "unsaid", settings=pruning)).isnan().all()


def test_recorded_size_of_a_network_that_is_not_pruned_changes_nothing(tmp_path: Path) -> None:
    settings = MLP | {"localized.rule": "none"}
    plain = count(tmp_path / "plain", settings=settings)
    assert count(tmp_path / "recorded", settings=settings, every_epoch={"forward_macs": 7}) == plain


def test_stochastic_depth_counts_what_its_steps_cost_on_average(tmp_path: Path) -> None:
    config: Config = parse_config(["--model.width=4", "--stochastic_depth.survival=0.5"])
    model = with_droppable_blocks(build_model(config.model, CLASSES), config.stochastic_depth)
    blocks = droppable_blocks(model)
    for block in blocks:
        block.dropped = False
    whole = counted_by_torch(model, None, batch=2, num_batches=1)
    expected = float(whole)
    for position, block in enumerate(blocks, start=1):
        block.dropped = True
        saved = whole - counted_by_torch(model, None, batch=2, num_batches=1)
        block.dropped = False
        expected -= saved * 0.5 * position / len(blocks)  # dropped with probability l / L (1 - p)
    settings = {"localized.rule": "none", "stochastic_depth.survival": 0.5}
    (flops,) = count(tmp_path / "run", images=2, settings=settings)
    assert flops == pytest.approx(expected)


def test_networks_that_share_nothing_but_their_name_are_counted_apart(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"width-{width}", [0.5], settings={"model.width": width, "localized.rule": "none"})
        for width in (4, 8)
    ]
    runs = [load_run(path) for path in paths]
    counter = FlopCounter(runs)
    narrow, wide = (float(counter.per_epoch(run)[0]) for run in runs)
    assert 3 < wide / narrow < 4  # all but the first and last layer have four times the products


def test_a_network_that_cannot_be_built_here_has_no_figure(tmp_path: Path) -> None:
    settings = {"model.name": "no_such_module:network", "model.width": None}
    assert torch.tensor(count(tmp_path / "run", settings=settings)).isnan().all()
