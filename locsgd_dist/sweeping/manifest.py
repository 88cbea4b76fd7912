"""``sweep.json``: what the runs in an output folder are to each other, for reports."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locsgd_dist.recording import RunDirectory
from locsgd_dist.recording.directory import write_atomically
from locsgd_dist.sweeping.expansion import Plan, PlannedVariant, Run
from locsgd_dist.sweeping.resolution import resolve, state_of

FILE_NAME = "sweep.json"
LOCK_NAME = ".sweep.lock"


def write_manifest(plan: Plan) -> None:
    """Writes ``OUT/sweep.json`` for all runs of the sweep, selected or not, as their directories stand."""
    plan.output.mkdir(parents=True, exist_ok=True)
    with in_turn(plan.output):
        write_atomically(plan.output / FILE_NAME, json.dumps(manifest(plan), indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def in_turn(output: Path) -> Iterator[None]:
    """Around writing to ``output`` what sweeps that work there at the same time all write."""
    with (output / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released as the file is closed
        yield


def manifest(plan: Plan) -> dict[str, Any]:
    """The sweep, its variants in the order of the file, and the state of each run."""
    sweep = plan.sweep
    return {
        "name": sweep.name,
        "title": sweep.title,
        "reproduces": sweep.reproduces,
        "baseline": sweep.baseline,
        "seeds": sweep.seeds,
        "nproc": sweep.nproc,
        "arguments": list(plan.extra),
        "variants": [_variant(plan, variant) for variant in plan.variants],
    }


def _variant(plan: Plan, variant: PlannedVariant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "label": variant.label,
        "benchmark": variant.benchmark,
        "benchmark_label": variant.benchmark_label,
        "strategy": variant.strategy,
        "point": dict(variant.point),
        "baseline": variant.baseline,
        "trace_of": variant.trace_of,
        "cost_of": variant.cost_of,
        "arguments": list(variant.arguments),
        "runs": [_run(plan, plan.run_of(variant.name, seed)) for seed in plan.sweep.seeds],
    }


def _run(plan: Plan, run: Run) -> dict[str, Any]:
    state = state_of(run)
    match = None
    if run.variant.cost_of:
        with contextlib.suppress(ValueError):  # what it needs is not finished, or does not record its cost
            match = resolve(plan, run).cost_match
    return {
        "seed": run.seed,
        "directory": str(run.directory.relative_to(plan.output)),
        "state": state.value,
        "epochs": RunDirectory(run.directory).load_config().get("train", {}).get("epochs"),
        "cost_match": match.to_json() if match else None,
    }
