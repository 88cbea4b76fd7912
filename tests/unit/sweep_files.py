"""Sweep files for tests, and a trainer that takes no time: it leaves what a run leaves and trains nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from locsgd_dist.config import parse_config
from locsgd_dist.sweeping.expansion import Plan, Run, plan_sweep
from locsgd_dist.sweeping.spec import Sweep, load_sweep

STAND_IN = """
import json, os, pathlib, signal, sys, time
job = json.load(open(sys.argv[1]))
run = pathlib.Path(job["run"])
if job["fails"]:
    print("no such luck")
    sys.exit(3)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text(job["config"])
signal.signal(signal.SIGTERM, lambda *_: ((run / "stopped").touch(), sys.exit(0)))
(run / "started").write_text(f"{time.time()} {os.environ['OMP_NUM_THREADS']}")
while job["hangs"]:
    time.sleep(0.02)
time.sleep(job["seconds"])
deadline = time.monotonic() + 120
while len(list(run.parents[1].glob("*/*/started"))) < job["meets"]:
    if time.monotonic() > deadline:
        sys.exit("not as many runs have started as are to meet")
    time.sleep(0.02)
with open(run / "metrics.jsonl", "w") as metrics:
    for record in job["records"]:
        print(json.dumps(record), file=metrics)
(run / "checkpoints" / f"epoch-{len(job['records']):04d}.pt").touch()
(run / "ended").write_text(str(time.time()))
"""


def write_sweep(folder: Path, **entries: Any) -> Path:
    """A sweep file over the quick start; ``entries`` replace its own."""
    content: dict[str, Any] = {
        "name": "trial",
        "base": ["quickstart"],
        "overrides": {"train.epochs": 4, "train.device": "cpu"},
        "variants": {"sgd": {"configs": ["strategies/sgd"]}, "local": {"configs": ["strategies/local_static"]}},
    }
    file = folder / "trial.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (content | entries).items() if v is not None}, sort_keys=False))
    return file


def read_sweep(folder: Path, **entries: Any) -> Sweep:
    return load_sweep(write_sweep(folder, **entries))


def plan(folder: Path, *extra: str, only: Sequence[str] | None = None, **entries: Any) -> Plan:
    return plan_sweep(read_sweep(folder, **entries), folder / "out", extra, only=only)


def records(epochs: int, seconds: float = 2.0, boundary: int = 0) -> list[dict[str, Any]]:
    """What metrics.jsonl says of ``epochs`` epochs of ``seconds`` each, of which the CPU worked half."""
    return [
        {"epoch": e, "seconds": seconds, "cpu_seconds": seconds / 2, "boundary": boundary, "val_top1": 0.5}
        for e in range(epochs)
    ]


def leave(run: Run, arguments: Sequence[str], metrics: list[dict[str, Any]], *, checkpoint: int | None = None) -> None:
    """A run directory as a run with these arguments leaves it."""
    config = parse_config(arguments)
    (run.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run.directory / "config.yaml").write_text(config.to_yaml())
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    epochs = len(metrics) if checkpoint is None else checkpoint
    if epochs:
        (run.directory / "checkpoints" / f"epoch-{epochs:04d}.pt").touch()


def stand_in(
    folder: Path, *, fails: Sequence[str] = (), hangs: Sequence[str] = (), seconds: float = 0.0, meets: int = 0
) -> Callable[[Sequence[str], int], list[str]]:
    """Command lines of the trainer's stand-in; runs whose folder has a name in ``fails`` or ``hangs`` do so.
    None ends before ``meets`` runs have started.

    An epoch of a localized run costs three quarters of one of SGD.
    """
    script = folder / "stand_in.py"
    script.write_text(STAND_IN)

    def command(arguments: Sequence[str], nproc: int) -> list[str]:
        config = parse_config(arguments)
        run = Path(config.run.dir)
        cost = 2.0 if config.localized.rule == "none" else 1.5
        job = {
            "run": str(run),
            "config": config.to_yaml(),
            "records": records(config.train.epochs, cost),
            "fails": run.parent.name in fails,
            "hangs": run.parent.name in hangs,
            "seconds": seconds,
            "meets": meets,
        }
        file = folder / f"{run.parent.name}-{run.name}.json"
        file.write_text(json.dumps(job))
        return [sys.executable, str(script), str(file)]

    return command
