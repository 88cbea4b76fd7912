"""The run that the benchmarks of reliability interrupt: small, and with everything in it that an interruption could
upset. Shifts after each epoch, a batch that doubles in the middle, learning-rate ramps, localized updates that wait for
their exchange, momentum, batch norm, dropout, augmentation, a moving average.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from locsgd_dist.checkpoint import CheckpointStore, load_state
from locsgd_dist.recording import RunDirectory

EPOCHS, SAMPLES, GLOBAL_BATCH = 4, 150, 16
FLAGS = (
    "--config=quickstart",
    "--model.name=small_run:network",
    "--model.width=null",
    "--data.name=digits",
    f"--data.train_samples={SAMPLES}",
    "--data.image_size=16",
    "--data.val_batch=40",
    "--data.workers=0",
    f"--train.epochs={EPOCHS}",
    "--train.device=cpu",
    "--train.deterministic=true",
    "--optim.lr=0.02",
    "--optim.ema_decay=0.9",
    "--localized.rule=hebbian",
    "--replicas.every=3",
    "--selection.kind=static",
    "--selection.lmax=0.75",
    "--batch.policy=halving",
    "--batch.memory_budget=1GiB",
    "--batch.min_steps=1",
    "--batch.interval_epochs=2",
    "--batch.lr_ramp_epochs=1.7",
    "--checkpoint.every_steps=4",
    "--run.console=quiet",
    "--run.report_every=null",
    "--monitor.trace_hz=0",
)
#: What a clock decides.
TIMES = {"seconds", "cpu_seconds", "eval_seconds", "images_per_second"}


def network(num_classes: int) -> nn.Module:
    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(3, 4),
        *convolution(4, 8),
        nn.Flatten(),
        nn.Linear(72, 24),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(24, num_classes),
    )


def flags_for(ranks: int, run_dir: Path) -> list[str]:
    """Command line on so many ranks: the global batch, and so the number of steps, is the same on any."""
    per_gpu = GLOBAL_BATCH // ranks
    return [*FLAGS, f"--batch.per_gpu={per_gpu}", f"--batch.max_per_gpu={2 * per_gpu}", f"--run.dir={run_dir}"]


def result_of(run_dir: Path) -> dict[str, Any]:
    """What must not depend on interruptions: the records but for times, and the state that training ended with."""
    records = [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in RunDirectory(run_dir).load_metrics()
    ]
    newest = CheckpointStore(run_dir / "checkpoints").load_newest()
    parts = ("model", "ema", "optimizer", "learner", "selector", "progress")
    return {"records": records, "state": {} if newest is None else {part: newest[1][part] for part in parts}}


def without_footprint(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "footprint_bytes"} for record in records]


def equal(a: Any, b: Any) -> bool:
    """To the last bit, whatever nests the tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def checkpoint_paths(run_dir: Path) -> list[Path]:
    return CheckpointStore(run_dir / "checkpoints").paths()


def is_readable(path: Path) -> bool:
    try:
        load_state(path)
    except ValueError:
        return False
    return True


def lost_and_repeated(steps: list[dict[str, Any]]) -> tuple[int, int]:
    """Samples that were lost and that were trained on twice within an epoch.

    Args:
        steps: of each rank and start of the run, what it trained on: ``attempt, epoch, before`` (samples of the run
            before the step), ``ids``. Steps that a later start went back behind do not count.
    """
    # A start that was over before its first step has changed nothing.
    starts: dict[int, int] = {}
    for step in steps:
        starts[step["attempt"]] = min(step["before"], starts.get(step["attempt"], step["before"]))
    counted: dict[int, list[int]] = {epoch: [] for epoch in range(EPOCHS)}
    for step in steps:
        later = [start for attempt, start in starts.items() if attempt > step["attempt"]]
        if all(step["before"] < start for start in later):
            counted[step["epoch"]] += step["ids"]
    lost = sum(len(set(range(SAMPLES)) - set(ids)) for ids in counted.values())
    repeated = sum(len(ids) - len(set(ids)) for ids in counted.values())
    return lost, repeated
