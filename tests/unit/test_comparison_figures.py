"""Means, deviations, ratios and readings of hand-made runs, worked out by hand."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import HEBBIAN, SGD, write_run

from locsgd_dist.config import parse_config
from locsgd_dist.reporting.comparison import Comparison
from locsgd_dist.reporting.comparison.grouping import Variant
from locsgd_dist.reporting.comparison.paper import paper
from locsgd_dist.reporting.comparison.readings import loss_within
from locsgd_dist.reporting.comparison.statistics import Summary
from locsgd_dist.reporting.comparison.traits import dataset_of, strategy_of

CIFAR = {"data.name": "cifar10"}


def variant(comparison: Comparison, name: str) -> Variant:
    return next(v for b in comparison.benchmarks for v in b.variants if v.name == name)


def figures(comparison: Comparison, name: str) -> dict[str, Summary]:
    return comparison.figures.of(variant(comparison, name))


def test_summary_is_mean_and_sample_deviation() -> None:
    values = {0: 0.91, 1: 0.89, 2: 0.94}
    summary = Summary.of(values | {3: float("nan"), 4: None})
    assert (summary.mean, summary.n) == (pytest.approx(statistics.mean(values.values())), 3)
    assert summary.sd == pytest.approx(statistics.stdev(values.values()))
    assert Summary.of({0: 1.0}).sd is None
    assert Summary.of({}).mean is None


def test_errors_and_speed_ups_over_seeds(tmp_path: Path) -> None:
    for seed, (base, local) in enumerate([(10.0, 8.0), (12.0, 8.0), (9.0, 9.0)]):
        write_run(tmp_path / f"sgd/seed-{seed}", [0.5, 0.9], seconds=base, settings=SGD, every_epoch={"cpu_seconds": 4})
        top1 = [0.88, 0.86 - 0.01 * seed]
        write_run(tmp_path / f"local/seed-{seed}", top1, seconds=local, settings=HEBBIAN, boundary=[0, 3])
    comparison = Comparison.of([tmp_path])
    assert comparison.messages == []
    local = figures(comparison, "local")
    assert local["final_error"].mean == pytest.approx(statistics.mean([0.14, 0.15, 0.16]))
    assert local["final_error"].sd == pytest.approx(statistics.stdev([0.14, 0.15, 0.16]))
    assert local["best_error"].mean == pytest.approx(0.12)
    assert local["error_increase"].mean == pytest.approx(0.05)
    ratios = [10 / 8, 12 / 8, 9 / 9]
    assert list(local["speed_up"].per_seed.values()) == pytest.approx(ratios)
    assert local["speed_up"].mean == pytest.approx(statistics.mean(ratios))
    assert local["speed_up"].sd == pytest.approx(statistics.stdev(ratios))
    assert local["seconds"].mean == pytest.approx(2 * statistics.mean([8, 8, 9]))
    # Older runs did not record processor time: the figure is missing, not zero.
    assert (local["cpu_seconds"].n, local["cpu_speed_up"].n) == (0, 0)
    assert figures(comparison, "sgd")["cpu_seconds"].mean == pytest.approx(8)
    assert local["final_boundary"].mean == 3
    footprints = [local[f"footprint_{which}_bytes"].mean for which in ("first", "last", "max")]
    assert footprints == [1000, 990, 1000]
    assert local["flops_ratio"].mean == pytest.approx(
        figures(comparison, "sgd")["flops"].mean / local["flops"].mean  # type: ignore[operator]
    )


def test_bytes_are_sums_over_epochs(tmp_path: Path) -> None:
    sent = {"world_size": 2, "grad_all_reduce_bytes": 100, "replica_sync_bytes": 7, "plain_ddp_bytes": 250}
    write_run(tmp_path / "local", [0.5, 0.6, 0.7], settings=HEBBIAN, every_epoch=sent)
    local = figures(Comparison.of([tmp_path]), "local")
    names = ("gradient_bytes", "replica_bytes", "exchanged_bytes", "plain_ddp_bytes")
    assert [local[name].mean for name in names] == [300, 21, 321, 750]


def test_a_seed_without_a_baseline_has_no_speed_up_and_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "sgd/seed-0", [0.9], seconds=2, settings=SGD)
    for seed in (0, 1):
        write_run(tmp_path / f"local/seed-{seed}", [0.8], seconds=1, settings=HEBBIAN)
    comparison = Comparison.of([tmp_path])
    assert figures(comparison, "local")["speed_up"].per_seed == {0: 2.0}
    assert figures(comparison, "local")["final_error"].n == 2
    assert comparison.messages == ["local: no run of the baseline sgd with seed 1, so no speed-up for it"]


def test_seeds_are_one_variant_whatever_does_not_change_what_is_computed(tmp_path: Path) -> None:
    for seed in (0, 1):
        trace = {"selection.kind": "replay", "selection.trace": f"/somewhere/seed-{seed}"}
        where = {"run.console": "plain", "checkpoint.keep": seed + 1, "data.workers": seed, "train.seed": seed}
        write_run(tmp_path / f"frozen-{seed}", [0.8], settings={"localized.rule": "frozen"} | trace | where)
    write_run(tmp_path / "other", [0.8], settings={"localized.rule": "frozen", "optim.lr": 0.07})
    comparison = Comparison.of([tmp_path])
    assert [(v.name, len(v.runs)) for b in comparison.benchmarks for v in b.variants] == [("frozen", 2), ("other", 1)]


def test_folders_of_a_sweep_stay_apart_and_a_stray_configuration_is_named(tmp_path: Path) -> None:
    for name in ("fast", "slow"):  # they replay different traces, which nothing else tells
        write_run(tmp_path / f"{name}/seed-0", [0.8], settings={"localized.rule": "frozen"})
    write_run(tmp_path / "slow/seed-1", [0.8], settings={"localized.rule": "frozen", "optim.lr": 0.07})
    comparison = Comparison.of([tmp_path])
    assert sorted(v.name for b in comparison.benchmarks for v in b.variants) == [
        *("fast", "slow (optim.lr=0.05)", "slow (optim.lr=0.07)")
    ]
    assert f"{tmp_path / 'slow'} holds runs of different configurations" in comparison.messages[0]


def test_schedules_matched_seed_by_seed_are_one_variant(tmp_path: Path) -> None:
    for seed, epochs in enumerate((3, 2)):
        write_run(tmp_path / f"sgd/seed-{seed}", [0.9] * 4, settings=SGD)
        write_run(tmp_path / f"short/seed-{seed}", [0.8] * epochs, settings=SGD)
    comparison = Comparison.of([tmp_path])
    short = variant(comparison, "short")
    assert (len(short.runs), short.epochs_text) == (2, "2–3")
    assert comparison.benchmarks[0].schedules == (short, variant(comparison, "sgd"))


def test_a_repeated_seed_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, [0.8], settings=SGD)
    comparison = Comparison.of([tmp_path])
    assert [str(run.path) for run in variant(comparison, "a").runs] == [str(tmp_path / "a")]
    assert len(comparison.messages) == 1
    assert str(tmp_path / "b") in comparison.messages[0]


def test_what_cannot_be_compared_is_named_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "good", [0.8], settings=SGD)
    write_run(tmp_path / "running", [0.8], epochs=3, settings=SGD)
    write_run(tmp_path / "good.old-1", [0.8], settings=SGD)
    write_run(tmp_path / "newer", [0.8], settings=SGD | {"optim.no_such_key": 1})
    gap = write_run(tmp_path / "gap", [0.7, 0.8, 0.9], settings=SGD)
    lines = (gap / "metrics.jsonl").read_text().splitlines(keepends=True)
    (gap / "metrics.jsonl").write_text(lines[0] + lines[2])
    reasons = {entry.path.name: entry.reason for entry in Comparison.of([tmp_path]).left_out}
    assert reasons.keys() == {"running", "good.old-1", "newer", "gap"}
    assert reasons["running"] == "unfinished, 1 of 3 epochs are recorded"
    assert "optim.no_such_key" in reasons["newer"]
    assert reasons["gap"].endswith("lacks epoch 1")
    assert "moved it aside" in reasons["good.old-1"]


@pytest.mark.parametrize("say", ["option", "manifest"])
def test_the_baseline_is_plain_sgd_at_the_most_epochs_unless_another_is_named(tmp_path: Path, say: str) -> None:
    write_run(tmp_path / "long/seed-0", [0.9] * 4, settings=SGD)
    write_run(tmp_path / "short/seed-0", [0.9] * 2, settings=SGD)
    write_run(tmp_path / "deep/seed-0", [0.9] * 8, settings=SGD | {"stochastic_depth.survival": 0.5})
    (benchmark,) = Comparison.of([tmp_path]).benchmarks
    assert benchmark.baseline is not None
    assert benchmark.baseline.name == "long"
    assert [v.name for v in benchmark.schedules] == ["short", "long"]
    if say == "manifest":
        entries = ", ".join(f'{{"name": "{name}", "baseline": "deep"}}' for name in ("long", "short", "deep"))
        (tmp_path / "sweep.json").write_text(f'{{"variants": [{entries}]}}')
    (benchmark,) = Comparison.of([tmp_path], "deep" if say == "option" else None).benchmarks
    assert benchmark.baseline is not None
    assert benchmark.baseline.name == "deep"


def test_networks_are_compared_with_their_own_baseline(tmp_path: Path) -> None:
    for network, seconds in (("resnet18", 4.0), ("vgg13", 9.0)):
        settings = CIFAR | {"model.name": network}
        write_run(tmp_path / network / "sgd/seed-0", [0.9], seconds=seconds, settings=SGD | settings)
        write_run(tmp_path / network / "local/seed-0", [0.9], seconds=3.0, settings=HEBBIAN | settings)
    comparison = Comparison.of([tmp_path])
    assert [b.name for b in comparison.benchmarks] == ["resnet18, cifar10", "vgg13, cifar10"]
    assert figures(comparison, "resnet18/local")["speed_up"].mean == pytest.approx(4 / 3)
    assert figures(comparison, "vgg13/local")["speed_up"].mean == pytest.approx(3)


def test_plain_sgd_at_equal_cost(tmp_path: Path) -> None:
    """Schedules of 10, 20 and 40 s end at 60, 70 and 80 %; costs of other runs fall on, between and beside them."""
    for epochs, top1 in ((1, 0.6), (2, 0.7), (4, 0.8)):
        curve = [top1 - 0.2 * (epochs - 1 - e) for e in range(epochs)]
        write_run(tmp_path / f"sgd-{epochs}/seed-0", curve, seconds=10, settings=SGD)
    for name, seconds, rate in (("cheap", 9, 0.02), ("between", 25, 0.03), ("dear", 50, 0.04)):
        write_run(tmp_path / f"{name}/seed-0", [0.75], seconds=seconds, settings=HEBBIAN | {"localized.lr": rate})
    comparison = Comparison.of([tmp_path])
    (benchmark,) = comparison.benchmarks
    readings = {r.variant.name: r for r in comparison.iso_cost[benchmark] if r.cost == "seconds"}
    assert readings["cheap"].sgd_error.n == 0
    assert readings["cheap"].advantage.n == 0
    assert readings["cheap"].running_error.n == 0
    assert readings["between"].sgd_error.mean == pytest.approx(1 - (0.7 + 0.1 * 5 / 20))
    assert readings["between"].advantage.mean == pytest.approx(0.75 - 0.725)
    # The baseline (40 s) had done two of its epochs by 25 s.
    assert readings["between"].running_error.mean == pytest.approx(1 - 0.4)
    assert readings["dear"].sgd_error.mean == pytest.approx(0.2)
    assert readings["dear"].advantage.mean == pytest.approx(-0.05)


def test_a_slow_short_schedule_does_not_lower_the_bar(tmp_path: Path) -> None:
    write_run(tmp_path / "sgd/seed-0", [0.5, 0.9], seconds=5, settings=SGD)
    write_run(tmp_path / "sgd-short/seed-0", [0.7], seconds=30, settings=SGD)  # the machine was busy
    write_run(tmp_path / "sgd-shortest/seed-0", [0.4], seconds=2, settings=SGD | {"optim.warmup_epochs": 0.5})
    for name, seconds, rate in (("dear", 40, 0.02), ("cheap", 6, 0.03)):
        write_run(tmp_path / f"{name}/seed-0", [0.8], seconds=seconds, settings=HEBBIAN | {"localized.lr": rate})
    comparison = Comparison.of([tmp_path])
    readings = {r.variant.name: r for r in comparison.iso_cost[comparison.benchmarks[0]] if r.cost == "seconds"}
    assert readings["dear"].sgd_error.mean == pytest.approx(0.1)
    assert readings["cheap"].sgd_error.mean == pytest.approx(1 - (0.4 + 0.5 * 4 / 8))  # from 2 s straight to 10 s


def test_plain_sgd_at_equal_accuracy(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"sgd/seed-{seed}", [0.5, 0.6, 0.7, 0.8], seconds=10, settings=SGD)
        write_run(tmp_path / f"sgd-2/seed-{seed}", [0.5, 0.65], seconds=10, settings=SGD)
        write_run(tmp_path / f"sgd-3/seed-{seed}", [0.5, 0.6, 0.75], seconds=10, settings=SGD)
    # Seed 0 is best after two of three epochs; seed 1 is better than SGD ever is.
    write_run(tmp_path / "local/seed-0", [0.6, 0.65, 0.62], seconds=[8, 6, 4], settings=HEBBIAN)
    write_run(tmp_path / "local/seed-1", [0.6, 0.7, 0.85], seconds=[8, 6, 4], settings=HEBBIAN)
    comparison = Comparison.of([tmp_path])
    (reading,) = comparison.iso_accuracy[comparison.benchmarks[0]]
    assert reading.num_seeds == 2
    assert reading.variant_epochs.per_seed == {0: 2, 1: 3}
    assert reading.baseline_epochs.per_seed == {0: 3}
    assert reading.baseline_error.mean == pytest.approx(0.3)
    assert reading.speed_up.per_seed == {0: pytest.approx(30 / 14)}
    assert reading.schedule_epochs.per_seed == {0: 2}
    assert reading.schedule_speed_up.per_seed == {0: pytest.approx(20 / 14)}


def test_loss_within_a_bound_takes_the_fastest_and_then_the_most_accurate(tmp_path: Path) -> None:
    write_run(tmp_path / "sgd/seed-0", [0.900], seconds=100, settings=SGD)
    local = {"a": (0.899, 95), "b": (0.896, 80), "c": (0.880, 50)}  # losses .1, .4, 2 %
    frozen = {"d": (0.895, 80), "e": (0.890, 60), "f": (0.899, 90)}
    for rule, runs in (("hebbian", local), ("frozen", frozen)):
        for index, (name, (top1, seconds)) in enumerate(runs.items()):
            settings = {"localized.rule": rule, "selection.alpha": 0.5 + 0.1 * index}
            write_run(tmp_path / f"{name}/seed-0", [top1], seconds=seconds, settings=settings)
    comparison = Comparison.of([tmp_path])
    variants = comparison.benchmarks[0].variants

    def chosen(bound: float) -> tuple[str | None, str | None]:
        reading = loss_within(bound, variants, comparison.figures)
        return tuple(v.name if v else None for v in (reading.local_sgd, reading.freezing))  # type: ignore[return-value]

    assert chosen(0.05) == (None, None)
    assert chosen(0.1) == ("a", "f")
    assert chosen(0.5) == ("b", "d")
    assert chosen(5.0) == ("c", None)


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        (["--localized.rule=none"], "sgd"),
        (["--localized.rule=hebbian"], "local_sgd"),
        (["--localized.rule=hebbian", "--selection.kind=static"], "local_sgd_static"),
        (["--localized.rule=frozen"], "freezing"),
        (["--localized.rule=frozen", "--selection.kind=replay", "--selection.trace=x"], "freezing"),
        (["--localized.rule=random", "--selection.kind=replay", "--selection.trace=x"], "random"),
        (["--localized.rule=anti_hebbian"], "anti_hebbian"),
        # the paper's direction with a step that is not the paper's
        (["--localized.rule=hebbian", "--localized.rule_options={length: filter}"], "hebbian"),
        (["--localized.rule=softhebb", "--selection.kind=static"], "softhebb_static"),
        (["--localized.rule=hebbian", "--selection.kind=fixed"], "hebbian_fixed"),
        (["--localized.rule=frozen", "--localized.refresh_every=4"], "frozen_refresh"),
        (["--localized.rule=none", "--stochastic_depth.survival=0.5"], "stochastic_depth"),
        (["--localized.rule=none", "--pruning.every_epochs=5"], "pruning"),
        (["--localized.rule=hebbian", "--stochastic_depth.survival=0.5"], "stochastic_depth+local_sgd"),
    ],
)
def test_strategy_is_found_from_the_configuration(arguments: list[str], strategy: str) -> None:
    assert strategy_of(parse_config(arguments)) == strategy


@pytest.mark.parametrize(
    ("arguments", "dataset"),
    [
        (["--data.name=cifar100"], "cifar100"),
        (["--data.name=imagefolder", "--data.root=/data/CIFAR-10"], "cifar10"),
        (["--data.name=imagefolder", "--data.root=/data/cifar100-jpeg"], "cifar100"),
        (["--data.name=imagefolder", "--data.root=/data/ILSVRC2012"], "imagenet"),
        (["--data.name=imagefolder", "--data.root=/data/pictures", "--data.normalization=cifar10"], "cifar10"),
        (["--data.name=imagefolder", "--data.root=/data/flowers"], "flowers"),
    ],
)
def test_dataset_is_found_behind_an_image_folder(arguments: list[str], dataset: str) -> None:
    assert dataset_of(parse_config(arguments)) == dataset


def rows(number: int) -> list[dict[str, Any]]:
    (table,) = [table for table in paper()["tables"] if table["number"] == number]
    content: list[dict[str, Any]] = table["rows"]
    return content


def test_the_papers_tables_agree_with_each_other() -> None:
    assert [len(rows(number)) for number in range(1, 9)] == [13, 14, 3, 4, 14, 4, 5, 2]
    main = {(r["network"], r["dataset"], r["strategy"]): r for r in [*rows(1), *rows(2)]}
    for row in rows(5):  # the same runs, told again
        again = main[row["network"], row["dataset"], "local_sgd"]["top1_error"]
        assert (again == row["top1_error"]) if row["weak_supervision"] else (again < row["top1_error"])
    for row in rows(4):
        if row["constants"] == "common":
            told = main[row["network"], "imagenet", "local_sgd"]
            assert told["speed_up"] == row["speed_up"]
            assert told["top1_error"] == row["top1_error"] or "note" in row
    gains = {key: main[key]["speed_up"] for key in main if key[2] != "sgd"}
    assert min(gains.values()) == 1.08
    assert max(gains.values()) == 1.65
    assert all(main[key]["speed_up"] == 1 for key in main if key[2] == "sgd")
