"""Strategies as overlays over a network's file, and runs that are older than a strategy's keys."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from locsgd_dist.checkpoint import CheckpointStore
from locsgd_dist.checkpoint.store import Position
from locsgd_dist.config import ConfigError, check_config, packaged_configs, parse_config
from locsgd_dist.localized import make_selector
from locsgd_dist.planner.command import plan


@pytest.mark.parametrize("rule", ["random", "anti_hebbian", "frozen"])
def test_a_rule_learns_on_a_replayed_boundary_trace(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace = [0, 0, 2, 4, 4, 6]
    lines = [json.dumps({"epoch": epoch, "boundary": boundary}) for epoch, boundary in enumerate(trace)]
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    (recorded / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "rule.yaml").write_text(yaml.safe_dump({"localized": {"rule": rule}}))
    (tmp_path / "replay.yaml").write_text(yaml.safe_dump({"selection": {"kind": "replay", "trace": "recorded"}}))
    overlays = ["--config", "quickstart", "--config", "rule.yaml", "--config", "replay.yaml"]
    config = parse_config([*overlays, "--train.epochs=6"])
    check_config(config)
    assert config.localized.rule == rule
    selector = make_selector(config.selection, num_layers=21, block_size=2, epochs=6)
    followed = [selector.boundary]
    followed += [selector.observe(epoch, [1.0] * 21) for epoch in range(5)]
    assert followed == trace


@pytest.mark.parametrize(
    "flag", ["--pruning.every_epochs=2", "--stochastic_depth.survival=0.5", "--localized.alignment_every=4"]
)
def test_what_changes_the_network_from_step_to_step_is_not_planned(flag: str) -> None:
    with pytest.raises(ValueError, match=rf"^{flag[2:].partition('=')[0]} .* cannot be planned"):
        plan(["--config", "quickstart", flag])


def test_intervals_that_follow_the_epoch_are_not_planned() -> None:
    with pytest.raises(ValueError, match=r"^localized\.refresh_growth=2 cannot be planned: "):
        plan(["--config", "quickstart", "--localized.refresh_every=2", "--localized.refresh_growth=2"])


@pytest.mark.parametrize("per_gpu", [2, 3, 7])
def test_a_batch_too_small_for_its_parts_is_one_line(per_gpu: int) -> None:
    with pytest.raises(ValueError, match=rf"^batch\.per_gpu must be >= 8 .* got {per_gpu}: "):
        plan(["--config", "cifar10/resnet18", "--config", "localized/recommended", f"--batch.per_gpu={per_gpu}"])


PRESETS = [name for name in packaged_configs() if name.startswith("localized/")]
NETWORKS = [name for name in packaged_configs() if name.startswith(("cifar10", "cifar100/", "imagenet/", "recipes/"))]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_means_the_same_over_any_network(preset: str) -> None:
    """What a network's file says of the localized region gives way, but for its own pace and its decay of eta."""
    own = {"localized": {"lr_decay", "lr_decay_epochs"}, "selection": {"tshift"}}
    if preset in ("localized/recommended", "localized/finetune", "localized/finetune_kept"):
        own["localized"] |= {"lr", "weak_supervision"}  # of no meaning to a rule that updates nothing
    if preset.startswith("localized/finetune"):
        own["selection"] |= {"window"}  # nor this to a boundary that stands
    assert len(NETWORKS) > 10
    alone = asdict(parse_config(["--config", preset]))
    for network in NETWORKS:
        check_config(parse_config(["--config", network, "--config", preset]), where="elsewhere")
        over = asdict(parse_config(["--config", network, "--config", preset]))
        for section, keys in own.items():
            assert {key for key in over[section] if over[section][key] != alone[section][key]} <= keys, network


def test_the_literal_preset_is_what_the_papers_files_say() -> None:
    for network in ("cifar10/resnet18", "cifar100/vgg13", "imagenet/resnet50", "imagenet/mobilenet_v2_1gpu"):
        own, preset = (
            parse_config(["--config", network, *more]) for more in ((), ("--config", "localized/paper_literal"))
        )
        assert (own.localized, own.selection) == (preset.localized, preset.selection)


def test_fine_tuning_begins_with_a_third_of_any_network_localized() -> None:
    config = parse_config(["--config", "localized/finetune"])
    for num_layers, boundary in ((21, 7), (54, 18), (11, 3)):
        selector = make_selector(config.selection, num_layers=num_layers, block_size=2, epochs=3)
        assert [selector.boundary, *(selector.observe(e, [1.0] * num_layers) for e in range(2))] == [boundary] * 3


def test_fine_tuning_with_kept_outputs_begins_with_half_of_any_network_at_rest() -> None:
    config = parse_config(["--config", "localized/finetune_kept"])
    for num_layers, boundary in ((21, 10), (54, 27), (11, 5)):
        assert make_selector(config.selection, num_layers=num_layers, block_size=2, epochs=3).boundary == boundary
    assert (config.localized.keep_outputs, config.data.draws) == (True, 8)


def test_a_run_that_is_older_than_a_key_goes_on_where_the_key_is_at_its_default(tmp_path: Path) -> None:
    config = parse_config(["--config", "quickstart", f"--run.dir={tmp_path}", "--run.resume=auto"])
    old = yaml.safe_load(config.to_yaml())
    del old["pruning"], old["stochastic_depth"], old["localized"]["norm_statistics"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    CheckpointStore(tmp_path / "checkpoints").save({"model": {"w": torch.zeros(1)}}, Position(1))
    check_config(config)
    changed = parse_config(["--config", str(tmp_path / "config.yaml"), "--pruning.every_epochs=2"])
    with pytest.raises(ConfigError, match=r"another configuration \(pruning\.every_epochs\)"):
        check_config(changed)
