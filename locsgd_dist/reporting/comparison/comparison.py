"""A comparison: runs found, grouped, measured against their baseline and beside the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from locsgd_dist.reporting.comparison.figures import Figures
from locsgd_dist.reporting.comparison.grouping import Benchmark, group_benchmarks, group_variants
from locsgd_dist.reporting.comparison.loading import LeftOut, find_run_directories, load_runs
from locsgd_dist.reporting.comparison.paper import PaperTable, paper_tables
from locsgd_dist.reporting.comparison.readings import IsoAccuracy, IsoCost, iso_accuracy, iso_cost


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that is shown.

    Attributes:
        benchmarks: each with its variants.
        figures: of every run and variant.
        left_out: run directories that do not take part.
        warnings: one line each, beside those of ``left_out``.
        tables: the paper's, all eight.
    """

    benchmarks: tuple[Benchmark, ...]
    figures: Figures
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]
    tables: tuple[PaperTable, ...]

    @classmethod
    def of(cls, paths: Sequence[Path], baseline: str | None = None) -> Comparison:
        """Compares the finished runs among and below ``paths``.

        Args:
            paths: run directories, or folders that hold some at any depth.
            baseline: name of the variant that speed-ups of its benchmark are relative to.

        Raises:
            ValueError: a path holds no run directory, no run is finished, or no variant is called ``baseline``.
        """
        directories = find_run_directories(paths)
        runs, left_out = load_runs(directories)
        if not runs:
            raise ValueError(f"none of {len(directories)} run directories can be compared; {left_out[0]}")
        variants, repeated, strays = group_variants(runs)
        benchmarks, warnings = group_benchmarks(variants, baseline)
        figures = Figures(benchmarks)
        tables = paper_tables(benchmarks, figures)
        return cls(
            tuple(benchmarks),
            figures,
            (*left_out, *repeated),
            (*strays, *warnings, *_unpaired(benchmarks)),
            tuple(tables),
        )

    @property
    def messages(self) -> list[str]:
        """What was left out and what to know, one line each."""
        return [*map(str, self.left_out), *self.warnings]

    @cached_property
    def iso_accuracy(self) -> dict[Benchmark, list[IsoAccuracy]]:
        return {benchmark: iso_accuracy(benchmark, self.figures) for benchmark in self.benchmarks}

    @cached_property
    def iso_cost(self) -> dict[Benchmark, list[IsoCost]]:
        return {benchmark: iso_cost(benchmark, self.figures) for benchmark in self.benchmarks}


def _unpaired(benchmarks: Sequence[Benchmark]) -> list[str]:
    """Warnings: seeds whose speed-up cannot be given."""
    lines = []
    for benchmark in benchmarks:
        base = benchmark.baseline
        for variant in benchmark.variants if base is not None else ():
            assert base is not None
            missing = [str(run.seed) for run in variant.runs if base.run_of(run.seed) is None]
            if missing:
                lines.append(
                    f"{variant.name}: no run of the baseline {base.name} with seed {', '.join(missing)}, "
                    "so no speed-up for it"
                )
    return lines
