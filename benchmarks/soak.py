"""Kills at random: ranks of a run are killed (SIGKILL) one after the other, and the run has to end bit-equal with one
that nothing happened to.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --kills 100 --json benchmarks/results/soak.json

In each run up to eight starts are cut off, each by the kill of a random rank at a random moment between the fork of the
ranks and the time after which they would have come to the end: some fall into starting up, some into saving, some into
the end. A kill that finds its rank gone already does not count.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fault_strikes import Strike, install
from measuring import command_line, write_json
from rank_agent import Rank, import_all, launch
from reliability import steps_of, uninterrupted
from small_run import EPOCHS, equal, flags_for, lost_and_repeated, result_of, without_footprint

from locsgd_dist.recording import RunDirectory

RANKS = (2, 2, 2, 1, 4)
"""Of one run after the other, unless the command line says."""
KILLS_PER_RUN = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of one run after the other")
    parser.add_argument("--minutes", type=float, help="start no further run after this long")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    start = time.monotonic()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_all(flags_for(1, folder / "unused")[:-1])
        references = {}
        for ranks in sorted(set(options.ranks)):
            began = time.monotonic()
            result = uninterrupted(folder / f"whole-{ranks}", ranks, not_finite=False)
            references[ranks] = (result, time.monotonic() - began)
        while (kills := sum(len(run["kills"]) for run in runs)) < options.kills:
            if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
                break
            ranks = options.ranks[len(runs) % len(options.ranks)]
            most = min(KILLS_PER_RUN, options.kills - kills)
            run = one_run(folder / f"{len(runs)}", ranks, most, *references[ranks], draw)
            runs.append(run)
            show(kills, run)
            write_json(options.json, summary(options.seed, runs))
            if not run["passed"]:
                print((folder / f"{len(runs) - 1}.log").read_text(errors="replace")[-6000:])
    result = summary(options.seed, runs)
    print(f"{result['kills']} kills in {len(runs)} runs, of which {result['passed']} ended bit-equal")
    return int(result["passed"] < len(runs) or result["kills"] < options.kills)


def one_run(
    run_dir: Path, ranks: int, most: int, reference: dict[str, Any], seconds: float, draw: random.Random
) -> dict[str, Any]:
    """Kills ``most`` starts of a run, then lets it end."""
    log, flags, directory = run_dir.with_suffix(".log"), flags_for(ranks, run_dir), RunDirectory(run_dir)

    def prepare(rank: Rank) -> None:
        install(rank, Strike(rank, 0, None, ""), raises=False, not_finite=False)

    launches, kills = [], []
    is_over = False
    while not is_over:
        # Starting up takes about a third of a whole run.
        left = 1 - len(directory.load_metrics()) / EPOCHS
        until = seconds * (1 + 2 * left) / 3
        kill = (draw.uniform(0, until), draw.randrange(ranks)) if len(kills) < most else None
        attempt = len(launches)
        done = launch(flags, ranks=ranks, log=log, attempt=attempt, restarts=attempt, prepare=prepare, kill=kill)
        launches.append(done)
        if kill is not None and done.exit_codes[kill[1]] == -9:
            kills.append(
                {"rank": kill[1], "after_seconds": round(kill[0], 3), "epochs_recorded": len(directory.load_metrics())}
            )
        is_over = not done.failed or kill is None
    lost, repeated = lost_and_repeated(steps_of(launches))
    result = result_of(run_dir)
    same = equal(result["state"], reference["state"])
    same = same and without_footprint(result["records"]) == without_footprint(reference["records"])
    return {
        "ranks": ranks,
        "kills": kills,
        "starts": len(launches),
        "finished": not launches[-1].failed,
        "samples_lost": lost,
        "samples_repeated": repeated,
        "bit_equal": same,
        "footprint_equal": result["records"] == reference["records"],
        "passed": not launches[-1].failed and same and lost == repeated == 0,
    }


def show(before: int, run: dict[str, Any]) -> None:
    last = before + len(run["kills"])
    print(
        f"{last:3d} kills  {'passed' if run['passed'] else 'FAILED'}  {run['ranks']} ranks, {run['starts']} starts, "
        f"killed after {[kill['after_seconds'] for kill in run['kills']]} s",
        flush=True,
    )


def summary(seed: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": command_line(),
        "kills": sum(len(run["kills"]) for run in runs),
        "runs_made": len(runs),
        "passed": sum(run["passed"] for run in runs),
        "bit_equal": sum(run["bit_equal"] for run in runs),
        "samples_lost": sum(run["samples_lost"] for run in runs),
        "samples_repeated": sum(run["samples_repeated"] for run in runs),
        "seed": seed,
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, CPU, fp32, gloo",
        "runs": runs,
    }


if __name__ == "__main__":
    sys.exit(main())
