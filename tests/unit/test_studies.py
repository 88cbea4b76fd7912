"""The committed studies: every run has a valid configuration, and the split of a set's classes is what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from locsgd_dist.sweeping.expansion import plan_sweep
from locsgd_dist.sweeping.spec import load_sweep

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_study_parses(path: Path, tmp_path: Path) -> None:
    plan = plan_sweep(load_sweep(path), tmp_path)
    assert plan.sweep.name == path.stem.replace("_", "-")
    assert plan.selected == plan.runs != ()
    configurations = [variant.config for variant in plan.variants]
    # What is compared differs in how it trains, not in the network or the images; bench_footprint asks what else fits.
    if path.stem != "bench_footprint":
        assert len({(repr(c.model), c.data.name, c.batch.per_gpu) for c in configurations}) == 1
    assert any(variant.config.localized.rule == "none" for variant in plan.variants)


def test_classes_are_dealt_out_in_turn(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        for label in "abcde":
            (tmp_path / "set" / folder / label).mkdir(parents=True)
            (tmp_path / "set" / folder / label / f"{label}.jpg").touch()
    split = runpy.run_path(str(FOLDER / "class_split.py"))["split"]
    even, odd = split(tmp_path / "set", tmp_path)
    assert (even.name, odd.name) == ("set-even", "set-odd")
    for folder in ("train", "test"):
        assert sorted(path.name for path in (even / folder).iterdir()) == ["a", "c", "e"]
        assert [path.name for path in sorted((odd / folder).glob("*/*.jpg"))] == ["b.jpg", "d.jpg"]
    assert split(tmp_path / "set", tmp_path) == (even, odd)
    with pytest.raises(FileNotFoundError, match="holds none of train/, val/, test/"):
        split(tmp_path / "set" / "train", tmp_path)
