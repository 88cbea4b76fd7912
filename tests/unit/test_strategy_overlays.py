"""Strategies as overlays over a network's file, and runs that are older than a strategy's keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from locsgd_dist.checkpoint import CheckpointStore
from locsgd_dist.checkpoint.store import Position
from locsgd_dist.config import ConfigError, check_config, parse_config
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
