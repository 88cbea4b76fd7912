"""What runs take from finished ones, when a run counts as finished, and which directories are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sweep_files import leave, plan, records

from locsgd_dist.config import parse_config
from locsgd_dist.sweeping.manifest import manifest
from locsgd_dist.sweeping.resolution import State, check_existing, match_cost, resolve, state_of

VARIANTS = {
    "sgd": {"configs": ["strategies/sgd"]},
    "local": {"configs": ["strategies/local_static"], "label": "LoCal+SGD"},
    "freezing": {"configs": ["strategies/freezing"], "trace_of": "local"},
    "short": {"configs": ["strategies/short_sgd"], "cost_of": "local"},
}


def finish(plan, name: str, seconds: float, epochs: int = 4, seed: int = 0) -> None:
    run = plan.run_of(name, seed)
    leave(run, resolve(plan, run).arguments, records(epochs, seconds))


def test_a_run_is_told_its_seed_its_folder_and_what_others_recorded(tmp_path: Path):
    p = plan(tmp_path, variants=VARIANTS, seeds=[0, 7])
    finish(p, "local", 1.5, seed=7)
    run = p.run_of("freezing", 7)
    config = resolve(p, run).config
    assert (config.train.seed, Path(config.run.dir)) == (7, tmp_path / "out/freezing/seed-7")
    assert (config.localized.rule, config.selection.kind) == ("frozen", "replay")
    assert Path(config.selection.trace or "") == tmp_path / "out/local/seed-7"
    with pytest.raises(ValueError, match=r"freezing/seed-0 needs local/seed-0, which is not finished"):
        resolve(p, p.run_of("freezing", 0))


@pytest.mark.parametrize(
    ("baseline", "of", "epochs"),
    [(2.0, 1.5, 3), (2.0, 1.74, 3), (2.0, 1.76, 4), (2.0, 0.1, 1), (2.0, 3.0, 6)],
)
def test_a_cost_is_matched_by_whole_epochs_of_the_baseline(baseline, of, epochs, tmp_path: Path):
    p = plan(tmp_path, variants=VARIANTS)
    finish(p, "sgd", baseline)
    finish(p, "local", of)
    resolved = resolve(p, p.run_of("short", 0))
    match = resolved.cost_match
    assert match is not None
    assert resolved.config.train.epochs == match.epochs == epochs
    # On the CPU the cost is CPU time, half of the seconds in these records.
    assert (match.unit, match.of, match.baseline) == ("cpu_seconds", pytest.approx(2 * of), pytest.approx(2 * baseline))
    assert match.ratio == pytest.approx(of / baseline)


def test_elsewhere_the_cost_is_wall_clock_and_a_schedule_in_steps_is_compressed(tmp_path: Path):
    p = plan(
        tmp_path,
        variants=VARIANTS,
        overrides={"train.epochs": 8, "train.device": "auto", "optim.schedule": "step", "optim.step_epochs": 4},
    )
    finish(p, "sgd", 2.0, epochs=8)
    finish(p, "local", 1.0, epochs=8)
    resolved = resolve(p, p.run_of("short", 0))
    assert resolved.cost_match is not None
    assert (resolved.cost_match.unit, resolved.cost_match.of) == ("seconds", 8.0)
    assert (resolved.config.train.epochs, resolved.config.optim.step_epochs) == (4, 2)


def test_a_record_without_cost_is_named(tmp_path: Path):
    p = plan(tmp_path, variants=VARIANTS)
    for name in ("sgd", "local"):
        run = p.run_of(name, 0)
        leave(run, resolve(p, run).arguments, [{"epoch": 0, "seconds": 1.0}])
    with pytest.raises(ValueError, match="local/seed-0 does not record cpu_seconds"):
        match_cost(p.run_of("local", 0).directory, p.run_of("sgd", 0).directory, "cpu_seconds")


def test_a_run_is_finished_when_its_last_epoch_is_recorded_and_saved(tmp_path: Path):
    p = plan(tmp_path)
    run = p.run_of("sgd", 0)
    arguments = resolve(p, run).arguments
    assert state_of(run) is State.MISSING
    for metrics, checkpoint, state in (
        ([], 0, State.UNFINISHED),
        (records(3), 3, State.UNFINISHED),
        (records(4), 3, State.UNFINISHED),  # killed between the record and the checkpoint
        (records(4), 4, State.FINISHED),
    ):
        leave(run, arguments, metrics, checkpoint=checkpoint)
        assert state_of(run) is state


def test_a_directory_with_another_configuration_is_refused_with_its_keys(tmp_path: Path):
    p = plan(tmp_path)
    finish(p, "sgd", 1.0)
    check_existing(p, p.runs)
    other = plan(tmp_path, "--optim.lr=0.5", "--train.epochs=5")
    with pytest.raises(
        ValueError, match=r"sgd/seed-0 holds a run with another configuration \(optim\.lr, train\.epochs\)"
    ):
        check_existing(other, other.runs)


def test_where_and_how_a_run_is_carried_out_may_differ(tmp_path: Path):
    p = plan(tmp_path)
    finish(p, "sgd", 1.0)
    other = plan(tmp_path, "--run.console=quiet", "--data.workers=1", "--train.device=auto", "--checkpoint.keep=5")
    check_existing(other, other.runs)
    rounded = plan(tmp_path, "--distributed.gradient_compression=bf16")
    with pytest.raises(ValueError, match=r"distributed\.gradient_compression"):
        check_existing(rounded, rounded.runs)


def test_keys_that_a_run_was_started_without_count_as_their_defaults(tmp_path: Path):
    p = plan(tmp_path)
    finish(p, "sgd", 1.0)
    file = p.run_of("sgd", 0).directory / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    del saved["pruning"], saved["optim"]["label_smoothing"]
    file.write_text(yaml.safe_dump(saved))
    check_existing(p, p.runs)
    other = plan(tmp_path, "--optim.label_smoothing=0.1")
    with pytest.raises(ValueError, match=r"optim\.label_smoothing"):
        check_existing(other, other.runs)


def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path):
    p = plan(tmp_path)
    finish(p, "sgd", 1.0)
    (p.run_of("sgd", 0).directory / "config.yaml").write_text("optim:\n  rate: 1\n")
    with pytest.raises(ValueError, match=r"sgd/seed-0 holds a run that cannot be compared: unknown key optim\.rate"):
        check_existing(p, p.runs)


def test_a_moved_output_keeps_its_runs_but_another_trace_is_another_run(tmp_path: Path):
    p = plan(tmp_path, variants=VARIANTS)
    for name in ("sgd", "local", "freezing"):
        finish(p, name, 1.0)
    (tmp_path / "out").rename(tmp_path / "kept")
    (tmp_path / "moved").mkdir()
    (tmp_path / "kept").rename(tmp_path / "moved/out")
    moved = plan(tmp_path / "moved", variants=VARIANTS)
    check_existing(moved, moved.runs)
    file = moved.run_of("freezing", 0).directory / "config.yaml"
    file.write_text(file.read_text().replace("/local/seed-0", "/other/seed-0"))
    with pytest.raises(ValueError, match=r"freezing/seed-0 .*selection\.trace"):
        check_existing(moved, moved.runs)


def test_a_matched_run_of_another_length_is_refused_once_the_length_is_known(tmp_path: Path):
    p = plan(tmp_path, variants=VARIANTS)
    short = p.run_of("short", 0)
    leave(short, [*short.variant.arguments, "--train.epochs=3", "--train.seed=0"], records(3))
    check_existing(p, [short])  # nobody knows yet
    finish(p, "sgd", 2.0)
    finish(p, "local", 1.5)
    check_existing(p, [short])
    finish(p, "local", 1.0)
    with pytest.raises(ValueError, match=r"short/seed-0 .*train\.epochs"):
        check_existing(p, [short])


def test_the_manifest_tells_runs_labels_and_states(tmp_path: Path):
    p = plan(tmp_path, "--optim.lr=0.5", variants=VARIANTS, seeds=[0, 1], reproduces="table2", title="A trial")
    finish(p, "sgd", 2.0)
    finish(p, "local", 1.5)
    content = manifest(p)
    assert (content["name"], content["title"], content["reproduces"]) == ("trial", "A trial", "table2")
    assert (content["baseline"], content["seeds"], content["arguments"]) == ("sgd", [0, 1], ["--optim.lr=0.5"])
    by_name = {v["name"]: v for v in content["variants"]}
    assert list(by_name) == ["sgd", "local", "freezing", "short"]
    assert (by_name["local"]["label"], by_name["sgd"]["label"]) == ("LoCal+SGD", "sgd")
    assert (by_name["freezing"]["trace_of"], by_name["short"]["cost_of"]) == ("local", "local")
    states = {name: [run["state"] for run in v["runs"]] for name, v in by_name.items()}
    assert states["sgd"] == states["local"] == ["finished", "missing"]
    assert states["freezing"] == states["short"] == ["missing", "missing"]
    first, second = by_name["short"]["runs"]
    assert first["directory"] == "short/seed-0"
    assert first["cost_match"] == {"unit": "cpu_seconds", "of": 3.0, "baseline": 4.0, "epochs": 3, "ratio": 0.75}
    assert second["cost_match"] is None
    arguments = by_name["local"]["arguments"]
    assert parse_config(arguments).optim.lr == 0.5
