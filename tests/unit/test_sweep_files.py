"""What a sweep file may say, and the runs that it expands to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sweep_files import plan, read_sweep, write_sweep

from locsgd_dist.sweeping.expansion import as_argument, check_machine, plan_sweep
from locsgd_dist.sweeping.spec import load_sweep

SGD = {"configs": ["strategies/sgd"]}
LOCAL = {"configs": ["strategies/local_dynamic"]}
BENCHMARKS = {"small": {"overrides": {"model.width": 4}, "label": "Small"}, "large": {"overrides": {"model.width": 6}}}

WRONG = [
    ({"name": None}, "name is missing"),
    ({"name": "a/b"}, "names must"),
    ({"variants": {}}, "variants"),
    ({"variants": [1]}, "variants must be a mapping"),
    ({"variants": {"sgd": {"config": ["strategies/sgd"]}}}, "variants.sgd.config; did you mean configs"),
    ({"variants": {"a b": {}}}, "'a b'"),
    ({"variants": {"sgd": {"configs": "strategies/sgd"}}}, "variants.sgd.configs must be a list of names"),
    ({"variants": {"sgd": {"overrides": {"lr": 1}}}}, "variants.sgd.overrides must hold section.key"),
    ({"variants": {"sgd": {"overrides": {"train.seed": 1}}}}, "train.seed"),
    ({"variants": {"a": {"grid": {"optim.lr": 0.1}}}}, "variants.a.grid.optim.lr must be a list"),
    ({"variants": {"a": {"grid": {"optim.lr": []}}}}, "variants.a.grid.optim.lr must be a list"),
    ({"variants": {"a": {"trace_of": "b"}}}, "variants.a.trace_of must be one of a, got 'b'"),
    ({"variants": {"a": {"trace_of": "b"}, "b": {"trace_of": "a"}}}, "circle: a, b"),
    (
        {"variants": {"a": {}, "b": {"cost_of": "a"}}},
        "variants.b.cost_of needs another variant as the sweep's baseline",
    ),
    ({"variants": {"sgd": {}, "b": {"benchmarks": ["large"]}}}, "variants.b.benchmarks"),
    (
        {"variants": {"a": {"benchmarks": ["small"]}, "b": {"trace_of": "a"}}, "benchmarks": BENCHMARKS},
        "variants.b.trace_of: a does not run on all of its benchmarks",
    ),
    (
        {"variants": {"a": {"grid": {"optim.lr": [1, 2]}}, "b": {"trace_of": "a"}}},
        "variants.b.trace_of: a has a grid",
    ),
    ({"baseline": "adam"}, "baseline"),
    ({"variants": {"sgd": {"grid": {"optim.lr": [1, 2]}}}}, "baseline must be a variant without a grid"),
    ({"seeds": []}, "seeds"),
    ({"seeds": [0, -1]}, "seeds"),
    ({"seeds": [1, 1]}, "seeds must differ"),
    ({"nproc": 0}, "nproc"),
    ({"reproduces": "table9"}, "reproduces must be one of table1"),
    ({"base": []}, "base or benchmarks"),
    ({"sweep": 1}, "unknown entry sweep"),
]


@pytest.mark.parametrize(("entries", "named"), WRONG, ids=[named for _, named in WRONG])
def test_a_wrong_entry_is_one_line_that_names_file_and_entry(entries, named, tmp_path: Path):
    file = write_sweep(tmp_path, **entries)
    with pytest.raises(ValueError, match=r"trial\.yaml") as caught:
        load_sweep(file)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [": [", "- a\n- b\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_sweep_is_one_line(content, tmp_path: Path):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"broken\.yaml") as caught:
        load_sweep(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"missing\.yaml cannot be read"):
        load_sweep(tmp_path / "missing.yaml")


def test_runs_are_benchmarks_times_variants_times_points_times_seeds(tmp_path: Path):
    found = plan(
        tmp_path,
        benchmarks=BENCHMARKS,
        seeds=[3, 5],
        variants={
            "sgd": SGD,
            "local": {**LOCAL, "grid": {"selection.alpha": [0.9, 1.0], "selection.tshift": [1, 2]}, "label": "Local"},
            "only": {**SGD, "benchmarks": ["large"]},
        },
    )
    grid = [f"local-alpha{a}-tshift{t}" for a in (0.9, 1.0) for t in (1, 2)]
    small, large = ["sgd", *grid], ["sgd", *grid, "only"]
    names = [f"small-{name}" for name in small] + [f"large-{name}" for name in large]
    assert [v.name for v in found.variants] == names
    # All variants of a seed before the next seed: whoever stops early has whole comparisons.
    assert [run.name for run in found.runs] == [f"{name}/seed-{s}" for s in (3, 5) for name in names]
    assert [run.directory for run in found.runs] == [tmp_path / "out" / run.name for run in found.runs]
    point = next(v for v in found.variants if v.name == "large-local-alpha1.0-tshift2")
    assert (point.config.model.width, point.config.selection.alpha, point.config.selection.tshift) == (6, 1.0, 2)
    assert (point.label, point.benchmark_label) == ("Local (alpha 1.0, tshift 2)", "large")
    assert {v.baseline for v in found.variants} == {"small-sgd", "large-sgd"}
    assert next(v for v in found.variants if v.name == "small-sgd").benchmark_label == "Small"


def test_later_layers_win_configs_then_overrides_then_grid_then_command_line(tmp_path: Path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("optim:\n  lr: 0.1\n  momentum: 0.1\n  weight_decay: 0.1\ntrain:\n  epochs: 9\n")
    found = plan(
        tmp_path,
        "--optim.warmup_epochs=4",
        overrides={"optim.momentum": 0.2, "optim.weight_decay": 0.2, "optim.warmup_epochs": 2},
        variants={
            "a": {
                "configs": [str(overlay)],
                "overrides": {"optim.weight_decay": 0.3, "optim.warmup_epochs": 3},
                "grid": {"optim.label_smoothing": [0.25]},
            }
        },
    )
    config = found.variants[0].config
    assert config.model.name == "resnet18"  # the base
    assert config.train.epochs == 9  # the overlay over the base
    optim = config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay) == (0.1, 0.2, 0.3)
    assert (optim.label_smoothing, optim.warmup_epochs) == (0.25, 4)


def test_a_grid_follows_the_grid_of_the_variant_whose_trace_it_replays(tmp_path: Path):
    grid = {"grid": {"selection.lmax": [0.5, 0.75]}}
    found = plan(tmp_path, variants={"freezing": {**grid, "trace_of": "local"}, "local": {**LOCAL, **grid}})
    pairs = {v.name: v.trace_of for v in found.variants if v.strategy == "freezing"}
    assert pairs == {"freezing-lmax0.5": "local-lmax0.5", "freezing-lmax0.75": "local-lmax0.75"}
    # What a run needs stands before it, whatever the order in the file.
    assert [run.variant.strategy for run in found.runs] == ["local", "freezing", "local", "freezing"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.001, "0.001"),
        (None, "null"),
        (True, "true"),
        ("block", "block"),
        ("1e-3", "1e-3"),
        ({"width_mult": 0.25, "list": [1, 2]}, "{list: [1, 2], width_mult: 0.25}"),
    ],
)
def test_values_are_written_as_the_command_line_reads_them(value, text):
    assert as_argument("a.b", value) == f"--a.b={text}"


def test_only_selects_variants_benchmarks_and_patterns(tmp_path: Path):
    variants = {"sgd": SGD, "local": {**LOCAL, "grid": {"selection.alpha": [0.9, 1.0]}}}
    sweep = read_sweep(tmp_path, benchmarks=BENCHMARKS, variants=variants, seeds=[0, 1])

    def selected(only=None, seeds=None):
        return [run.name for run in plan_sweep(sweep, tmp_path, only=only, seeds=seeds).selected]

    assert len(selected()) == 12
    assert selected(["sgd"], [1]) == ["small-sgd/seed-1", "large-sgd/seed-1"]
    assert selected(["small"], [0]) == [f"small-{n}/seed-0" for n in ("sgd", "local-alpha0.9", "local-alpha1.0")]
    assert selected(["*-alpha0.9"], [0]) == ["small-local-alpha0.9/seed-0", "large-local-alpha0.9/seed-0"]
    with pytest.raises(ValueError, match=r"--only must name variants of the sweep .*got lokal"):
        selected(["lokal"])
    with pytest.raises(ValueError, match="--seeds must be among"):
        selected(None, [2])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--optim.lr=abc"], "variant sgd: optim.lr must be a number"),
        (["--optim.foo=1"], "variant sgd: unknown key optim.foo"),
        (["--train.seed=1"], "--train.seed must not be given"),
        (["--run.dir=x"], "--run.dir must not be given"),
        (["--optim.lr", "1"], "must read --section.key=value"),
        (["stray"], "must read --section.key=value"),
    ],
)
def test_wrong_arguments_for_all_runs_are_named(extra, named, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(named)):
        plan(tmp_path, *extra)


def test_every_variant_is_parsed_and_the_wrong_one_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^variant b-lr-1: optim\.lr must be > 0"):
        plan(tmp_path, variants={"sgd": SGD, "b": {"grid": {"optim.lr": [0.1, -1]}}})
    with pytest.raises(ValueError, match=r"^variant b: config must be .*got 'strategies/sgdd'"):
        plan(tmp_path, variants={"sgd": SGD, "b": {"configs": ["strategies/sgdd"]}})
    with pytest.raises(ValueError, match="two variants are called b-lr1"):
        plan(tmp_path, variants={"b": {"grid": {"optim.lr": [1]}}, "b-lr1": {}})


def test_what_the_machine_lacks_is_said_of_selected_variants_only(tmp_path: Path):
    variants = {
        "sgd": SGD,
        "b": {"overrides": {"localized.rule": "hebian"}},
        "c": {**LOCAL, "overrides": {"selection.kind": "replay", "selection.trace": "nowhere"}},
        "d": {"configs": ["strategies/freezing"], "trace_of": "sgd"},
        "e": {"overrides": {"data.name": "imagefolder", "data.root": str(tmp_path / "nowhere")}},
    }
    for name, key in (("b", r"localized\.rule"), ("c", r"selection\.trace"), ("e", r"data\.root")):
        with pytest.raises(ValueError, match=f"^variant {name}: {key}"):
            check_machine(plan(tmp_path, variants=variants, only=["sgd", name]))
    check_machine(plan(tmp_path, variants=variants, only=["sgd", "d"]))  # its trace is still to be recorded
