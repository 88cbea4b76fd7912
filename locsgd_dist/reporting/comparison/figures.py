"""Figures of merit: of one run, of a run against the baseline's run of the same seed, of a variant over its seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from locsgd_dist.reporting.comparison.flops import FlopCounter
from locsgd_dist.reporting.comparison.grouping import Benchmark, Variant
from locsgd_dist.reporting.comparison.loading import Run
from locsgd_dist.reporting.comparison.statistics import Summary
from locsgd_dist.reporting.run_data import Array, finite, first_and_last

COSTS = ("flops", "seconds", "cpu_seconds")
"""What accuracy is paid with, the figure without noise first."""

RUN_FIGURES = {
    "final_error": "top-1 error on the validation set after the last epoch, as a fraction",
    "best_error": "smallest top-1 error of any evaluated epoch, as a fraction",
    "epochs": "epochs trained",
    "samples": "training images seen",
    "seconds": "training time: sum over epochs, evaluations and checkpoints apart",
    "cpu_seconds": "processor time of training, largest of the ranks in each epoch, summed over epochs",
    "flops": "floating-point operations of training in convolutions and linear maps, all ranks together",
    "final_boundary": "boundary in the last epoch, in layers",
    "footprint_first_bytes": "footprint of the first epoch",
    "footprint_last_bytes": "footprint of the last epoch",
    "footprint_max_bytes": "largest footprint of any epoch",
    "gradient_bytes": "payload of gradient all-reduces per rank, summed over epochs",
    "replica_bytes": "payload of the exchange of localized updates or weights per rank, summed over epochs",
    "exchanged_bytes": "gradient_bytes + replica_bytes",
    "plain_ddp_bytes": "what plain DDP would have exchanged per rank at the starting batch",
}
"""Per run: name → meaning."""

PAIRED_FIGURES = {
    "error_increase": "final_error minus the baseline's, same seed",
    "speed_up": "the baseline's seconds over this run's, same seed",
    "cpu_speed_up": "the baseline's cpu_seconds over this run's, same seed",
    "flops_ratio": "the baseline's flops over this run's, same seed",
}
"""Per run beside the baseline's run of the same seed: name → meaning."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A run's evaluated epochs.

    Attributes:
        epochs: [P] epochs trained at each point, from 1.
        top1: [P] validation accuracy.
        samples, seconds, cpu_seconds, flops: [P] spent up to there; all NaN where not known.
    """

    epochs: Array
    top1: Array
    samples: Array
    seconds: Array
    cpu_seconds: Array
    flops: Array

    def cost(self, name: str) -> Array:
        values: Array = getattr(self, name)
        return values


class Figures:
    """All figures of a comparison, computed once."""

    def __init__(self, benchmarks: list[Benchmark]):
        self.benchmarks = benchmarks
        runs = [run for benchmark in benchmarks for variant in benchmark.variants for run in variant.runs]
        counter = FlopCounter(runs)
        self.curves: Mapping[Run, Curve] = {run: _curve(run, counter.per_epoch(run)) for run in runs}
        self.of_run: Mapping[Run, dict[str, float]] = {run: _run_figures(run, self.curves[run]) for run in runs}
        self._variants = {
            variant: self._variant_figures(variant, benchmark.baseline)
            for benchmark in benchmarks
            for variant in benchmark.variants
        }

    def of(self, variant: Variant) -> dict[str, Summary]:
        """Name of each of :data:`RUN_FIGURES` and :data:`PAIRED_FIGURES` → its summary over seeds."""
        return self._variants[variant]

    def over_seeds(self, variant: Variant, name: str) -> dict[int, float]:
        """A figure of :data:`RUN_FIGURES` by seed; NaN where it is not known."""
        return {run.seed: self.of_run[run][name] for run in variant.runs}

    @cached_property
    def has_cpu_seconds(self) -> bool:
        return any(np.isfinite(figures["cpu_seconds"]) for figures in self.of_run.values())

    def _variant_figures(self, variant: Variant, baseline: Variant | None) -> dict[str, Summary]:
        summaries = {name: Summary.of(self.over_seeds(variant, name)) for name in RUN_FIGURES}
        pairs = {run.seed: (run, baseline.run_of(run.seed) if baseline else None) for run in variant.runs}
        for name in PAIRED_FIGURES:
            summaries[name] = Summary.of(
                {
                    seed: self._paired(name, self.of_run[run], self.of_run[base])
                    for seed, (run, base) in pairs.items()
                    if base is not None
                }
            )
        return summaries

    @staticmethod
    def _paired(name: str, run: Mapping[str, float], baseline: Mapping[str, float]) -> float:
        if name == "error_increase":
            return run["final_error"] - baseline["final_error"]
        cost = {"speed_up": "seconds", "cpu_speed_up": "cpu_seconds", "flops_ratio": "flops"}[name]
        return baseline[cost] / run[cost] if run[cost] > 0 else np.nan


def _curve(run: Run, flops: Array) -> Curve:
    evaluated = np.isfinite(run.top1)
    return Curve(
        epochs=run.data.epochs[evaluated] + 1,
        top1=run.top1[evaluated],
        samples=run.data.series("samples_seen")[evaluated],
        seconds=run.cumulative("seconds")[evaluated],
        cpu_seconds=run.cumulative("cpu_seconds")[evaluated],
        flops=np.cumsum(flops)[evaluated],
    )


def _run_figures(run: Run, curve: Curve) -> dict[str, float]:
    """Every one of :data:`RUN_FIGURES`; NaN where it is not known. The last epoch is always evaluated."""
    footprint = run.data.series("footprint_bytes")
    ends = first_and_last(footprint) or (np.nan, np.nan)
    return {
        "final_error": 1 - float(curve.top1[-1]),
        "best_error": 1 - float(curve.top1.max()),
        "epochs": float(run.config.train.epochs),
        "samples": float(curve.samples[-1]),
        "seconds": float(curve.seconds[-1]),
        "cpu_seconds": float(curve.cpu_seconds[-1]),
        "flops": float(curve.flops[-1]),
        "final_boundary": float(run.data.series("boundary")[-1]),
        "footprint_first_bytes": ends[0],
        "footprint_last_bytes": ends[1],
        "footprint_max_bytes": float(finite(footprint).max()) if finite(footprint).size else np.nan,
        "gradient_bytes": float(run.data.series("grad_all_reduce_bytes").sum()),
        "replica_bytes": float(run.data.series("replica_sync_bytes").sum()),
        "exchanged_bytes": float(run.data.exchanged_bytes.sum()),
        "plain_ddp_bytes": float(run.data.series("plain_ddp_bytes").sum()),
    }
