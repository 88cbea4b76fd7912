"""Run directories for comparisons, each number given by the test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SGD = {"localized.rule": "none"}
HEBBIAN = {"localized.rule": "hebbian"}


def write_run(
    path: Path,
    top1: Sequence[float | None],
    *,
    seconds: float | Sequence[float] = 1.0,
    boundary: int | Sequence[int] = 0,
    images: int = 100,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    every_epoch: Mapping[str, Any] | None = None,
) -> Path:
    """A run with one record per value of ``top1``.

    Args:
        seconds, boundary: of each epoch, or of all.
        images: training images per epoch.
        epochs: planned ones; by default as many as are recorded.
        settings: ``section.key`` → value, beside ResNet-18 of width 4 on digits.
        every_epoch: further fields of each record; None leaves a field out.
    """
    path.mkdir(parents=True)
    count = len(top1)
    seed = int(path.name.removeprefix("seed-")) if path.name.startswith("seed-") else 0
    keys = {
        "model.name": "resnet18",
        "model.width": 4,
        "data.name": "digits",
        "train.device": "cpu",
        "train.epochs": count if epochs is None else epochs,
        "train.seed": seed,
        "run.dir": str(path),
        **(settings or {}),
    }
    config: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {
            "epoch": epoch,
            "samples_seen": (epoch + 1) * images,
            "boundary": boundary[epoch] if isinstance(boundary, Sequence) else boundary,
            "num_layers": 21,
            "per_gpu_batch": 64,
            "world_size": 1,
            "val_top1": top1[epoch],
            "seconds": seconds[epoch] if isinstance(seconds, Sequence) else seconds,
            "footprint_bytes": 1000 - 10 * epoch,
            "grad_all_reduce_bytes": 0,
            "replica_sync_bytes": 0,
            "plain_ddp_bytes": 0,
        }
        | dict(every_epoch or {})
        for epoch in range(count)
    ]
    kept = [{k: v for k, v in record.items() if v is not None or k == "val_top1"} for record in records]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return path
