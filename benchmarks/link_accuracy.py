"""Accuracy against time of fine-tuning on ranks behind a slow link: what the saved memory buys there.

    python benchmarks/link_accuracy.py --link-mbps 200 --seeds 0 1 --output benchmarks/results/link_accuracy.json \\
        --data.name=imagefolder --data.root=DATA/NAME-odd --data.image_size=32 --data.normalization=cifar10 \\
        --model.weights=pretrained.pt

Fine-tuning as in studies/bench_f.yaml (1,000 images, 20 epochs) by real runs of the trainer, one after the other, seed
by seed; each rank lives behind a link of that rate (needs root). What is not an option of this script goes to the
trainer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import environment, write_json
from rich.console import Console
from rich.table import Table
from shaped_link import run_ranks

from locsgd_dist.recording import RunDirectory

COMMON = [
    *("--config", "cifar10/resnet18", "--config", "cifar10/screen"),
    *("--data.train_samples=1000", "--train.device=cpu", "--train.evaluate_every=100", "--checkpoint.every_epochs=100"),
    *("--run.report_every=null", "--run.console=plain", "--run.resume=never"),
]
SGD, FINETUNE = ("--config", "strategies/sgd"), ("--config", "localized/finetune")
#: Unless the name says otherwise: 32 images per rank and step, 20 epochs, a learning rate of .05 (.1 at batch 64).
VARIANTS: dict[str, list[str]] = {
    "sgd": [*SGD, "--batch.per_gpu=32"],
    "sgd, 15 epochs": [*SGD, "--batch.per_gpu=32", "--train.epochs=15"],
    "sgd, batch 64": [*SGD, "--batch.per_gpu=64", "--optim.lr=0.1"],
    "finetune": [*FINETUNE, "--batch.per_gpu=32"],
    "finetune, batch 64": [*FINETUNE, "--batch.per_gpu=64", "--optim.lr=0.1"],
    "finetune of half, batch 64": [*FINETUNE, "--selection.lmax=0.53", "--batch.per_gpu=64", "--optim.lr=0.1"],
}


def train(variant: str, seed: int, options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Runs one variant and sums up its records."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*COMMON, "--train.epochs=20", *VARIANTS[variant], f"--train.seed={seed}", f"--run.dir={folder}/run"]
        run_ranks(["-m", "locsgd_dist.train", *flags, *rest], options.ranks, options.link_mbps)
        epochs = RunDirectory(Path(folder) / "run").load_metrics()
    return {
        "variant": variant,
        "seed": seed,
        "epochs": len(epochs),
        "boundary": epochs[-1]["boundary"],
        "top1": epochs[-1]["val_top1"],
        # All epochs, the first with its cold caches and the measurement of memory too.
        "training_seconds": sum(epoch["seconds"] for epoch in epochs),
        "exchanged_bytes": sum(epoch["grad_all_reduce_bytes"] + epoch["replica_sync_bytes"] for epoch in epochs),
        "exchanges": sum(epoch["grad_all_reduce_count"] for epoch in epochs),
        "footprint_bytes": epochs[-1]["footprint_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--link-mbps", type=float, help="default: no link, the loopback device")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path)
    options, rest = parser.parse_known_args()
    settings = {"ranks": options.ranks, "link_mbps": options.link_mbps}
    records = []
    for seed in options.seeds:
        for variant in options.variants:
            records.append(train(variant, seed, options, rest))
            print(records[-1], file=sys.stderr, flush=True)
            write_json(options.output, environment(torch.device("cpu")) | settings | {"runs": records})
    table = Table(title=f"{options.ranks} ranks, {options.link_mbps} Mbit/s")
    for column in ("variant", "seed", "top-1", "s", "MiB exchanged", "footprint, MiB"):
        table.add_column(column)
    for run in records:
        table.add_row(
            run["variant"],
            str(run["seed"]),
            f"{run['top1']:.1%}",
            f"{run['training_seconds']:.1f}",
            f"{run['exchanged_bytes'] / 2**20:.0f}",
            f"{run['footprint_bytes'] / 2**20:.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
