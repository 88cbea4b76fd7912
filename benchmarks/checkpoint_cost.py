"""How long training stands still for a checkpoint, beside a plain ``torch.save``.

    python benchmarks/checkpoint_cost.py --output benchmarks/results/checkpoint_cost.json

ResNet-50 with momentum on one process; the same state each time. ``stopped`` is what training waits for: the copy into
host memory. ``written`` is when the file stands on disk with its checksum; meanwhile training goes on. ``torch.save``
is what a plain loop waits for, without and with the sync that makes it survive a power cut.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import environment, seconds_of, spread, write_json
from rich.console import Console
from rich.table import Table

from locsgd_dist.config import parse_config
from locsgd_dist.trainer import Trainer

CPU = torch.device("cpu")


def plain_state(trainer: Trainer) -> dict[str, Any]:
    return {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.optimizer.state_dict()}


def save_synced(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in ("stopped", "written", "torch.save", "torch.save, synced")}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model.name=torchvision:resnet50", "--model.width=null", "--data.name=digits", "--run.console=quiet"]
        flags += ["--data.train_samples=4", "--train.evaluate_every=9", "--batch.per_gpu=2", "--train.epochs=1"]
        flags += [f"--train.device={options.device}", "--run.report_every=null", f"--run.dir={folder}/run"]
        with Trainer(parse_config(["--config", "quickstart", *flags])) as trainer:
            trainer.fit()
            for _ in range(options.rounds):
                start = time.perf_counter()
                trainer.checkpoints.save()
                taken["stopped"].append(time.perf_counter() - start)
                trainer.checkpoints.finish()
                taken["written"].append(time.perf_counter() - start)
                state, path = plain_state(trainer), Path(folder) / "plain.pt"
                taken["torch.save"].append(seconds_of(partial(torch.save, state, path), CPU))
                taken["torch.save, synced"].append(seconds_of(partial(save_synced, state, path), CPU))
            num_bytes = path.stat().st_size
    table = Table("", "seconds (median)", title=f"One checkpoint of {num_bytes / 1e6:.0f} MB")
    result = {name: spread(values) for name, values in taken.items()}
    for name, values in taken.items():
        table.add_row(name, f"{sorted(values)[len(values) // 2]:.3f}")
    Console().print(table)
    if options.output:
        write_json(
            options.output,
            {"bytes": num_bytes, "seconds": result, "environment": environment(torch.device(options.device))},
        )


if __name__ == "__main__":
    main()
