"""A run directory as training leaves it, with numbers that follow simple formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

MIB = 2**20
START = 1_760_000_000.0
SAMPLES = 50_000


def write_run(
    path: Path,
    *,
    num_epochs: int = 12,
    num_layers: int = 21,
    ranks: int = 2,
    memory_hz: float = 0.2,
    **config: Any,
) -> Path:
    """Writes config.yaml, metrics.jsonl, events.jsonl and memory.csv of a run whose boundary climbs evenly to 3/4,
    whose footprint falls with it and whose batch doubles once, halfway."""
    path.mkdir(parents=True)
    sections = {
        "model": {"name": "resnet18", "width": 64, "weights": None},
        "data": {"name": "cifar10", "train_samples": None},
        "train": {"epochs": num_epochs, "seed": 0, "precision": "fp32"},
        "optim": {"name": "sgd", "lr": 0.05, "schedule": "cosine"},
        "localized": {"rule": "hebbian", "lr": 0.01},
        "selection": {"kind": "dynamic", "alpha": 0.95, "lmax": 0.75, "tshift": "block"},
        "replicas": {"mode": "sharded", "every": 8},
        "batch": {"per_gpu": 64, "policy": "halving"},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(sections | config, sort_keys=False))
    epochs = [epoch_metrics(epoch, num_epochs, num_layers, ranks) for epoch in range(num_epochs)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in run_events(epochs)))
    write_memory_csv(path / "memory.csv", epochs, ranks, memory_hz)
    return path


def epoch_metrics(epoch: int, num_epochs: int, num_layers: int, ranks: int) -> dict[str, Any]:
    done = epoch / max(num_epochs - 1, 1)
    boundary = int(0.75 * num_layers * done)
    per_gpu = 64 if 2 * epoch < num_epochs else 128
    steps = math.ceil(SAMPLES / (ranks * per_gpu))
    parameters = 45 * MIB
    rate = 0.025 * (1 + math.cos(math.pi * done)) * per_gpu / 64
    layers = range(num_layers)
    return {
        "epoch": epoch,
        "samples_seen": (epoch + 1) * SAMPLES,
        "boundary": boundary,
        "num_layers": num_layers,
        "per_gpu_batch": per_gpu,
        "global_batch": per_gpu * ranks,
        "world_size": ranks,
        "lr": rate,
        "local_lr": 0.01 * 0.5 ** (epoch // 30),
        "sign": -1 if epoch % 11 == 7 else 1,
        "transition_update_norm": 40 * rate + 0.4 * math.sin(epoch) ** 2,
        "transition_update_norm_per_lr": 3 + 0.5 * math.sin(epoch),
        "train_loss": 2.2 * math.exp(-3 * done) + 0.05 * math.sin(3 * epoch) + 0.15,
        "train_top1": 0.97 - 0.6 * math.exp(-4 * done),
        "val_loss": 1.9 * math.exp(-2.6 * done) + 0.28,
        "val_top1": 0.94 - 0.55 * math.exp(-4 * done),
        "ema_val_top1": 0.945 - 0.6 * math.exp(-4.2 * done),
        "seconds": 60 / (1 + 0.4 * done),
        "images_per_second": SAMPLES / 60 * (1 + 0.4 * done),
        "footprint_bytes": int((300 + 1500 * (1 - 0.9 * boundary / num_layers) * per_gpu / 64) * MIB),
        "footprint_source": "nvml",
        "grad_all_reduce_bytes": int(steps * parameters * (1 - (boundary / num_layers) ** 2)),
        "grad_all_reduce_count": 3 * steps,
        "plain_ddp_bytes": math.ceil(SAMPLES / (ranks * 64)) * parameters,
        "replica_sync_bytes": int(steps * parameters * (boundary / num_layers) ** 2 / 8),
        "boundary_next": boundary,
        "layer_names": [f"layer{i // 4}.{i % 4}.conv" for i in layers],
        "layer_norm": [(4 + i % 7) * (1 + 0.03 * epoch * (i < boundary)) for i in layers],
        "layer_drift": [0.1 * (1 - done) ** 2 / (1 + i % 5) + 1e-4 for i in layers],
        "layer_effective_rank": [(40 + 3 * (i % 5)) * (0.99 ** (epoch * (i < boundary))) for i in layers],
    }


def run_events(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    time = START
    for now, after in zip(epochs, [*epochs[1:], None], strict=True):
        time += now["seconds"]
        header = {"epoch": now["epoch"], "samples_seen": now["samples_seen"], "time": time}
        events.append({"type": "checkpoint"} | header | {"path": f"checkpoints/epoch-{now['epoch']:04d}"})
        if after is None:
            break
        if after["boundary"] > now["boundary"]:
            moved = {"boundary_from": now["boundary"], "boundary_to": after["boundary"]}
            events.append({"type": "shift"} | header | moved)
        if after["per_gpu_batch"] != now["per_gpu_batch"]:
            sizes = {"per_gpu_from": now["per_gpu_batch"], "per_gpu_to": after["per_gpu_batch"]}
            events.append({"type": "batch"} | header | sizes)
        if now["epoch"] == len(epochs) // 3:
            events.append({"type": "oom"} | header | {"time": time + 5, "message": "rank 1 while trying 256"})
    return events


def write_memory_csv(path: Path, epochs: list[dict[str, Any]], ranks: int, hz: float) -> None:
    """Every rank's samples at `hz`; rank r lies 4 % below rank r − 1, and each tenth sample is at the peak."""
    lines = ["time,rank,nvml_device_used,nvml_process_used,cuda_allocated,host_rss"]
    time = START
    for epoch in epochs:
        count = int(epoch["seconds"] * hz)
        for sample in range(count):
            for rank in range(ranks):
                peak = epoch["footprint_bytes"] * (1 - 0.04 * rank) * (1 if sample % 10 == 0 else 0.93)
                stamp = time + sample / hz + 0.01 * rank
                lines.append(f"{stamp:.2f},{rank},{int(peak) + 400 * MIB},{int(peak)},{int(peak * 0.8)},{2000 * MIB}")
        time += epoch["seconds"]
    path.write_text("\n".join(lines) + "\n")
