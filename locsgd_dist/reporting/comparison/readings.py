"""Accuracies at equal cost and costs at equal accuracy, seed by seed.

Costs are those of training alone: operations, seconds, processor seconds. Nothing is extrapolated: where no run at hand
is cheap or accurate enough there is no reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from locsgd_dist.reporting.comparison.figures import COSTS, Curve, Figures
from locsgd_dist.reporting.comparison.grouping import Benchmark, Variant
from locsgd_dist.reporting.comparison.loading import Run
from locsgd_dist.reporting.comparison.statistics import Summary


@dataclass(frozen=True, eq=False)
class IsoAccuracy:
    """What plain SGD takes to be as accurate as a variant at its best (the paper's table 6).

    A variant's run reaches its best accuracy A after ``variant_epochs`` and a time t. Two readings of what SGD, same
    seed, needs for A:

    Attributes:
        error: 1 - A.
        variant_epochs: epochs of the variant until A; the first of the evaluated epochs that has it.
        baseline_epochs: epochs of the *baseline's own run* until its accuracy is at least A: the paper's reading. In
            the middle of a schedule, before the learning rate has fallen, SGD is far from its best; this flatters the
            variant.
        baseline_error: the baseline's error there.
        speed_up: the baseline's time until there over t.
        schedule_epochs: epochs of the *shortest SGD schedule* among the runs whose final accuracy is at least A: what
            one would train in its place.
        schedule_speed_up: time of that whole run over t.
        num_seeds: seeds with a run of the variant and of the baseline. Where a summary has fewer, SGD does not reach A
            with the other seeds.
    """

    variant: Variant
    error: Summary
    variant_epochs: Summary
    baseline_epochs: Summary
    baseline_error: Summary
    speed_up: Summary
    schedule_epochs: Summary
    schedule_speed_up: Summary
    num_seeds: int


def iso_accuracy(benchmark: Benchmark, figures: Figures) -> list[IsoAccuracy]:
    """Of every variant that is no SGD schedule; none without a baseline."""
    if benchmark.baseline is None:
        return []
    return [_iso_accuracy(v, benchmark, figures) for v in benchmark.variants if v not in _sgd(benchmark)]


def _iso_accuracy(variant: Variant, benchmark: Benchmark, figures: Figures) -> IsoAccuracy:
    assert benchmark.baseline is not None
    values: dict[str, dict[int, float | None]] = {
        name: {}
        for name in (
            *("error", "variant_epochs", "baseline_epochs", "baseline_error"),
            *("speed_up", "schedule_epochs", "schedule_speed_up"),
        )
    }
    num_seeds = 0
    for run in variant.runs:
        seed, curve = run.seed, figures.curves[run]
        best = int(curve.top1.argmax())
        values["error"][seed] = 1 - float(curve.top1[best])
        values["variant_epochs"][seed] = float(curve.epochs[best])
        baseline = benchmark.baseline.run_of(seed)
        if baseline is None:
            continue
        num_seeds += 1
        spent = float(curve.seconds[best])
        reference = figures.curves[baseline]
        if (reached := first_at_least(reference, float(curve.top1[best]))) is not None:
            values["baseline_epochs"][seed] = float(reference.epochs[reached])
            values["baseline_error"][seed] = 1 - float(reference.top1[reached])
            values["speed_up"][seed] = float(reference.seconds[reached]) / spent
        for schedule in runs_of_seed(benchmark.schedules, seed):
            whole = figures.curves[schedule]
            if whole.top1[-1] >= curve.top1[best]:
                values["schedule_epochs"][seed] = float(whole.epochs[-1])
                values["schedule_speed_up"][seed] = float(whole.seconds[-1]) / spent
                break
    return IsoAccuracy(variant, num_seeds=num_seeds, **{name: Summary.of(by_seed) for name, by_seed in values.items()})


def first_at_least(curve: Curve, top1: float) -> int | None:
    """Index of the first evaluated epoch with at least that accuracy; None if there is none."""
    reached = np.flatnonzero(curve.top1 >= top1)
    return int(reached[0]) if reached.size else None


@dataclass(frozen=True, eq=False)
class IsoCost:
    """A variant against plain SGD that costs the same (``cost``: one of :data:`COSTS`).

    Attributes:
        sgd_error: error of plain SGD at the variant's whole cost, same seed (:func:`accuracy_of_sgd_at`).
        advantage: that minus the variant's final error, as a fraction: positive where the variant beats the schedule
            that one would have trained in its place.
        running_error: error of the baseline's own run at the same cost: of its last evaluated epoch within it. The
            baseline is then in the middle of its schedule.
    """

    variant: Variant
    cost: str
    sgd_error: Summary
    advantage: Summary
    running_error: Summary


def iso_cost(benchmark: Benchmark, figures: Figures) -> list[IsoCost]:
    """Of every variant that is no SGD schedule and every kind of cost that is known."""
    if benchmark.baseline is None:
        return []
    readings = []
    for variant in benchmark.variants:
        if variant in _sgd(benchmark):
            continue
        for cost in COSTS:
            spent = figures.over_seeds(variant, cost)
            if not any(np.isfinite(value) for value in spent.values()):
                continue
            errors = figures.over_seeds(variant, "final_error")
            sgd = {seed: accuracy_of_sgd_at(spent[seed], benchmark, figures, seed, cost) for seed in spent}
            running = {
                seed: accuracy_within(figures.curves[run], spent[seed], cost)
                for seed in spent
                if (run := benchmark.baseline.run_of(seed)) is not None
            }
            readings.append(
                IsoCost(
                    variant,
                    cost,
                    sgd_error=Summary.of({seed: 1 - top1 for seed, top1 in sgd.items() if top1 is not None}),
                    advantage=Summary.of(
                        {seed: 1 - top1 - errors[seed] for seed, top1 in sgd.items() if top1 is not None}
                    ),
                    running_error=Summary.of({seed: 1 - top1 for seed, top1 in running.items() if top1 is not None}),
                )
            )
    return readings


def accuracy_of_sgd_at(spent: float, benchmark: Benchmark, figures: Figures, seed: int, cost: str) -> float | None:
    """Final accuracy that a schedule of plain SGD reaches for that cost, told from the runs with that seed.

    On the straight line between the two schedules of the :func:`frontier` on both sides of the cost; beyond the dearest
    its accuracy holds, for it fits within the cost; nothing where even the cheapest costs more.
    """
    curves = [figures.curves[run] for run in runs_of_seed(benchmark.schedules, seed)]
    known = [(float(curve.cost(cost)[-1]), float(curve.top1[-1])) for curve in curves]
    points = frontier([point for point in known if np.isfinite(point[0])])
    if not points or not spent >= points[0][0]:
        return None
    costs, accuracies = zip(*points, strict=True)
    return float(np.interp(spent, costs, accuracies))


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) points to which no other is at once as cheap and as accurate, by cost.

    Accuracy rises along it. Measured times may put a shorter schedule behind a longer one: it drops out here.
    """
    kept: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or accuracy > kept[-1][1]:
            kept.append((cost, accuracy))
    return kept


def accuracy_within(curve: Curve, spent: float, cost: str) -> float | None:
    """Accuracy of the last evaluated epoch that costs at most ``spent``; None if there is none."""
    within = np.flatnonzero(curve.cost(cost) <= spent)
    return float(curve.top1[within[-1]]) if within.size else None


@dataclass(frozen=True, eq=False)
class LossWithin:
    """One line of the paper's table 7.

    Of the LoCal+SGD variants whose mean loss of accuracy is at most ``max_loss`` percent the fastest is taken; of the
    freezing variants that are at least as fast (mean speed-up) the most accurate. Losses are against the baseline's run
    of the same seed, in fractions.
    """

    max_loss: float
    local_sgd: Variant | None
    freezing: Variant | None


def loss_within(max_loss: float, variants: Sequence[Variant], figures: Figures) -> LossWithin:
    """The variants that stand for that bound, given in percent."""

    def mean(variant: Variant, name: str) -> float:
        value = figures.of(variant)[name].mean
        return np.nan if value is None else value

    def of(strategies: tuple[str, ...]) -> list[Variant]:
        return [v for v in variants if v.traits.strategy in strategies and np.isfinite(mean(v, "speed_up"))]

    allowed = [v for v in of(("local_sgd", "local_sgd_static")) if 100 * mean(v, "error_increase") <= max_loss + 1e-9]
    if not allowed:
        return LossWithin(max_loss, None, None)
    local = max(allowed, key=lambda v: mean(v, "speed_up"))
    as_fast = [v for v in of(("freezing",)) if mean(v, "speed_up") >= mean(local, "speed_up")]
    return LossWithin(max_loss, local, min(as_fast, key=lambda v: mean(v, "error_increase"), default=None))


def runs_of_seed(variants: Sequence[Variant], seed: int) -> list[Run]:
    """Their runs of that seed, in their order."""
    return [run for variant in variants if (run := variant.run_of(seed)) is not None]


def _sgd(benchmark: Benchmark) -> tuple[Variant | None, ...]:
    return (benchmark.baseline, *benchmark.schedules)
