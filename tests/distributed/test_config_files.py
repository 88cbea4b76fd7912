"""Every packaged configuration builds its network and takes two real steps on two ranks, which end equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rank_pool import free_ports, world_of_its_own

from locsgd_dist.config import packaged_configs, parse_config
from locsgd_dist.recording import RunDirectory
from locsgd_dist.trainer import Trainer

STEPS, RANKS, BATCH = 2, 2, 2
#: What a file says is left as it is, but for which images, how many at a time, and how long.
TINY = (
    "--data.workers=0",
    "--data.cache=false",
    f"--batch.per_gpu={BATCH}",
    "--train.epochs=1",
    "--train.device=cpu",
    "--train.compile=false",  # compiled networks have tests of their own
    "--monitor.nvml=false",
    "--run.console=quiet",
    "--run.report_every=null",
)
#: Layers of each network, and classes of its data, from the paper.
NETWORKS = {"resnet18": 21, "vgg13": 11, "resnet34": 37, "resnet50": 54, "mobilenet_v2": 53}
RULES = {
    "strategies/sgd": "none",
    "strategies/short_sgd": "none",
    "strategies/stochastic_depth": "none",
    "strategies/pruning": "none",
    "strategies/local_dynamic": "hebbian",
    "strategies/local_static": "hebbian",
    "strategies/no_weak_supervision": "hebbian",
    "strategies/freezing": "frozen",
    "strategies/freezing_held": "frozen",
    "strategies/random": "random",
    "strategies/anti_hebbian": "anti_hebbian",
    "localized/paper": "hebbian",
    "localized/paper_literal": "hebbian",
    "localized/recommended": "frozen",
    "localized/finetune": "frozen",
    "localized/finetune_kept": "frozen",
}
#: Layers of the localized region move by their true gradient, whatever the rule.
TRUE_IN_EVERY_STEP = {"localized/recommended"}
OVERLAYS = {name for name in packaged_configs() if name.startswith(("strategies/", "localized/"))} | {"cifar10/screen"}
WHOLE = sorted(set(packaged_configs()) - OVERLAYS)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of two classes, one folder each, in the shapes that photographs come in."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, count in (("train", STEPS * RANKS * BATCH // 2), ("val", 1)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (70 + 10 * index, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpeg")
    return root


def train(ports: list[int], arguments: list[str]) -> tuple[str, int]:
    """Trains in a world of its own, then puts the pool's back; the weights' digest, and the layers."""
    with world_of_its_own(ports), Trainer(parse_config(arguments)) as trainer:
        trainer.fit()
        digest = hashlib.sha256()
        for parameter in trainer.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        return digest.hexdigest(), len(trainer.learner.layers)


def two_steps(two_ranks: Any, arguments: list[str], run: Path) -> tuple[int, dict[str, Any]]:
    """Layers of the network and the record of the epoch."""
    (first, layers), (second, _) = two_ranks.run(train, free_ports(2), [*arguments, *TINY, f"--run.dir={run}"])
    assert first == second
    (record,) = RunDirectory(run).load_metrics()
    assert (record["num_steps"], record["world_size"], record["samples_seen"]) == (STEPS, RANKS, STEPS * RANKS * BATCH)
    assert np.isfinite([record["train_loss"], record["val_loss"]]).all()
    return layers, record


def data_arguments(name: str, photographs: Path) -> list[str]:
    if parse_config(["--config", name]).data.name == "imagefolder":
        return [f"--data.root={photographs}", "--data.image_size=64"]
    return ["--data.name=small_images:SmallImages", "--data.train_samples=null"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_benchmark_takes_two_steps_on_two_ranks(name: str, photographs: Path, two_ranks: Any, tmp_path: Path):
    layers, _ = two_steps(two_ranks, ["--config", name, *data_arguments(name, photographs)], tmp_path / "run")
    assert layers == NETWORKS[parse_config(["--config", name]).model.name]


@pytest.mark.parametrize("name", sorted(OVERLAYS))
def test_an_overlay_takes_two_steps_with_layers_localized(name: str, two_ranks: Any, tmp_path: Path):
    run = tmp_path / "run"
    arguments = ["--config", "cifar10/resnet18", "--config", name]
    arguments += ["--data.name=small_images:SmallImages", "--data.train_samples=null"]
    # Narrower than 8 channels, torch 2.14's channels-last convolutions on the CPU write beyond their memory.
    arguments += ["--model.width=8"]
    # The selection of a short run would not move: half of the layers are localized from the start.
    fixed = ["--selection.kind=fixed", "--selection.boundary=10"]
    assert parse_config(arguments).localized.rule == RULES.get(name, "hebbian")
    _, record = two_steps(two_ranks, [*arguments, *fixed], run)
    is_localized = parse_config(arguments).localized.rule != "none"
    assert record["boundary"] == (10 if is_localized else 0)
    moved = np.asarray(record["layer_update_norm"]) > 0
    if name == "strategies/stochastic_depth":
        assert moved[[0, -1]].all()  # what lies between them may have been skipped in both steps
    else:
        assert moved[10:].all()
        learns = RULES.get(name, "hebbian") != "frozen" or name in TRUE_IN_EVERY_STEP
        assert (moved[:10] == learns).all()


@pytest.fixture(autouse=True)
def _no_files_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}
