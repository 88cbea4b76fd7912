"""compare.json: every number with its n, for programs. docs/compare.md describes the fields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from locsgd_dist.recording.directory import to_json_value
from locsgd_dist.reporting.comparison.comparison import Comparison
from locsgd_dist.reporting.comparison.figures import Curve
from locsgd_dist.reporting.comparison.grouping import Benchmark, Variant
from locsgd_dist.reporting.comparison.loading import Run
from locsgd_dist.reporting.comparison.paper import PaperTable, departures, paper
from locsgd_dist.reporting.comparison.readings import IsoAccuracy, IsoCost
from locsgd_dist.reporting.comparison.traits import variant_settings

SCHEMA = 1
"""Grows when a field changes its meaning or goes."""


def to_json(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """The comparison in JSON's types; paths of runs are relative to ``folder``."""
    content = {
        "schema": SCHEMA,
        "benchmarks": [_benchmark(comparison, benchmark, folder) for benchmark in comparison.benchmarks],
        "paper": {"source": paper()["source"], "tables": [_paper_table(table) for table in comparison.tables]},
        "left_out": [{"path": os.path.relpath(e.path, folder), "reason": e.reason} for e in comparison.left_out],
        "warnings": list(comparison.warnings),
    }
    converted: dict[str, Any] = to_json_value(content)
    return converted


def _benchmark(comparison: Comparison, benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    traits = benchmark.variants[0].traits
    return {
        "name": benchmark.name,
        "network": traits.network,
        "dataset": traits.dataset,
        "num_gpus": traits.num_gpus,
        "baseline": None if benchmark.baseline is None else benchmark.baseline.name,
        "sgd_schedules": [variant.name for variant in benchmark.schedules],
        "variants": [_variant(comparison, benchmark, variant, folder) for variant in benchmark.variants],
    }


def _variant(comparison: Comparison, benchmark: Benchmark, variant: Variant, folder: Path) -> dict[str, Any]:
    accuracy = [r for r in comparison.iso_accuracy[benchmark] if r.variant is variant]
    costs = [r for r in comparison.iso_cost[benchmark] if r.variant is variant]
    return {
        "name": variant.name,
        "strategy": variant.traits.strategy,
        "seeds": [run.seed for run in variant.runs],
        "settings": variant_settings(variant.first.config),
        "departures": list(departures(variant)),
        "figures": {name: summary.to_json() for name, summary in comparison.figures.of(variant).items()},
        "iso_accuracy": _iso_accuracy(accuracy[0]) if accuracy else None,
        "iso_cost": {reading.cost: _iso_cost(reading) for reading in costs},
        "runs": [_run(comparison, run, folder) for run in variant.runs],
    }


def _iso_accuracy(reading: IsoAccuracy) -> dict[str, Any]:
    names = (
        *("error", "variant_epochs", "baseline_epochs", "baseline_error"),
        *("speed_up", "schedule_epochs", "schedule_speed_up"),
    )
    return {name: getattr(reading, name).to_json() for name in names} | {"num_seeds": reading.num_seeds}


def _iso_cost(reading: IsoCost) -> dict[str, Any]:
    return {name: getattr(reading, name).to_json() for name in ("sgd_error", "advantage", "running_error")}


def _run(comparison: Comparison, run: Run, folder: Path) -> dict[str, Any]:
    return {
        "name": run.name,
        "path": os.path.relpath(run.path, folder),
        "seed": run.seed,
        "figures": comparison.figures.of_run[run],
        "curve": _curve(comparison.figures.curves[run]),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    names = ("epochs", "top1", "samples", "seconds", "cpu_seconds", "flops")
    return {name: getattr(curve, name).tolist() for name in names}


def _paper_table(table: PaperTable) -> dict[str, Any]:
    return {
        "number": table.number,
        "title": table.title,
        "rows": [
            {
                "network": row.network,
                "dataset": row.dataset,
                "label": row.label,
                "paper": dict(row.columns),
                "note": row.note,
                "status": "run" if row.matches else "not run",
                "matches": [
                    {
                        "variant": match.variant.name,
                        "cells": {name: cell.to_json() for name, cell in match.cells.items()},
                        "departures": list(match.departures),
                    }
                    for match in row.matches
                ],
            }
            for row in table.rows
        ],
    }
