"""Kills in a row: a run is started by launch/local.sh, one of its ranks is killed (SIGKILL), and the run has to finish.

    python benchmarks/restarts.py --kills 20 --json benchmarks/results/restarts.json

Each kill is a run of its own: a random rank, at a random moment between the ranks' start and the time after which an
undisturbed run was over, so that some fall into starting up and some into saving. Passed means exit code 0, every epoch
recorded once, and every sample counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import command_line, write_json

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
EPOCHS, SAMPLES = 3, 192
TRAINER = (
    "--config=quickstart",
    "--model.width=4",
    f"--data.train_samples={SAMPLES}",
    "--data.workers=0",
    "--batch.policy=fixed",
    f"--train.epochs={EPOCHS}",
    "--run.report_every=null",
)
PATIENCE = 600
"""Seconds after which a run counts as hanging."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=1.0, help="latest kill, as a share of an undisturbed run's time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = one_run(Path(folder) / "undisturbed", options.ranks, None)
        print(f"undisturbed: {undisturbed['seconds']:.0f} s, exit code {undisturbed['exit_code']}", flush=True)
        for number in range(1, options.kills + 1):
            kill = (draw.uniform(0, options.until * undisturbed["seconds_of_ranks"]), draw.randrange(options.ranks))
            result = one_run(Path(folder) / str(number), options.ranks, kill)
            results.append(result)
            print(
                f"{number:3d}  rank {result['killed_rank']} killed after {result['killed_after']:5.1f} s "
                f"({result['epochs_recorded_at_kill']} epochs recorded)  {'passed' if result['passed'] else 'FAILED'}, "
                f"{result['restarts']} restarts, {result['resumes']} resumes, {result['seconds']:.0f} s",
                flush=True,
            )
            write_json(options.json, summary(options, undisturbed, results))
    failed = sum(not result["passed"] for result in results)
    print(f"{len(results) - failed} of {len(results)} runs with a killed rank finished")
    return 1 if failed else 0


def one_run(run_dir: Path, ranks: int, kill: tuple[float, int] | None) -> dict[str, Any]:
    """Starts a run and, where ``kill`` gives seconds and a rank, kills that rank so long after the ranks appeared."""
    command = ["bash", str(LOCAL), f"--nproc-per-node={ranks}", "--", *TRAINER, f"--run.dir={run_dir}"]
    log = run_dir.with_suffix(".log")
    start = time.monotonic()
    result: dict[str, Any] = {}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHON": sys.executable}, stdout=output, stderr=subprocess.STDOUT
        )
        workers = wait_for_ranks(process, ranks)
        ranks_start = time.monotonic()
        if kill is not None:
            seconds, rank = kill
            time.sleep(seconds)
            result |= {"killed_rank": rank, "killed_after": round(seconds, 2)}
            result["epochs_recorded_at_kill"] = len(read_records(run_dir))
            try:
                os.kill(workers[rank], signal.SIGKILL)
            except ProcessLookupError:
                result["too_late"] = True
        code, result["restarts"] = wait_for_end(process)
    end = time.monotonic()
    records = read_records(run_dir)
    counted = [(record["epoch"], record["samples_seen"]) for record in records]
    passed = code == 0 and counted == [(epoch, (epoch + 1) * SAMPLES) for epoch in range(EPOCHS)]
    if not passed:
        result["log"] = log.read_text(errors="replace")[-3000:]
    result["resumes"] = sum(event["type"] == "resume" for event in read_lines(run_dir / "events.jsonl"))
    result |= {"exit_code": code, "passed": passed, "seconds": round(end - start, 1)}
    return result | {"seconds_of_ranks": round(end - ranks_start, 1)}


def wait_for_ranks(process: subprocess.Popen[bytes], ranks: int) -> list[int]:
    """Process ids of torchrun's ranks, in order, as soon as they are there."""
    while process.poll() is None:
        for torchrun in children(process.pid):
            # A child that has not become a rank yet still has torchrun's command line and environment.
            by_rank = {rank_of(pid): pid for pid in children(torchrun) if b"locsgd_dist.train" in command_of(pid)}
            if sorted(rank for rank in by_rank if rank is not None) == list(range(ranks)):
                return [by_rank[rank] for rank in range(ranks)]
        time.sleep(0.05)
    raise RuntimeError("the run was over before its ranks were seen")


def wait_for_end(process: subprocess.Popen[bytes]) -> tuple[int | None, int]:
    """The exit code (None: ended here, since it took too long) and how often torchrun started all ranks anew."""
    deadline, restarts = time.monotonic() + PATIENCE, 0
    while process.poll() is None:
        ranks = [rank for torchrun in children(process.pid) for rank in children(torchrun)]
        restarts = max([restarts, *(int(variables(rank).get("TORCHELASTIC_RESTART_COUNT", 0)) for rank in ranks)])
        if time.monotonic() > deadline:
            process.terminate()
            process.wait()
            return None, restarts
        time.sleep(0.2)
    return process.returncode, restarts


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def rank_of(pid: int) -> int | None:
    rank = variables(pid).get("RANK")
    return None if rank is None else int(rank)


def variables(pid: int) -> dict[str, str]:
    """A process's environment; empty where it is gone."""
    try:
        content = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(variable.split("=", 1) for variable in content.split("\0") if "=" in variable)


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    return read_lines(run_dir / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(options: argparse.Namespace, undisturbed: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": command_line(),
        "ranks": options.ranks,
        "seed": options.seed,
        "kills": len(results),
        "finished": sum(result["passed"] for result in results),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "undisturbed": undisturbed,
        "runs": results,
    }


if __name__ == "__main__":
    sys.exit(main())
