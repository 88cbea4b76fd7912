"""Does the prefix's true gradient change slowly enough that an interval between true steps could follow it?

    python benchmarks/gradient_change.py --output results/gradient_change.json --config cifar10/resnet18 \\
        --config cifar10/screen --config localized/recommended --localized.refresh_every=4 \\
        --localized.refresh_fraction=1 --localized.refresh_gain=2

What is not an option of this script goes to the trainer, one process. For each epoch, over the localized layers'
gradients in refresh steps, as the optimizer takes them:

- ``cosine``: of one true step's gradient with the next one's, the median of the epoch;
- ``change``: the length of their difference over that of the first, the median; sqrt(2) where gradients of equal length
  have nothing in common;
- ``signal``: the share of a gradient that is the same in the whole epoch: the squared length of the epoch's mean over
  the mean squared length, noise taken off;
- ``epoch_cosine``: of the epoch's mean gradient with that of the epoch before.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from measuring import environment, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from locsgd_dist.config import check_config, parse_config
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.trainer import Trainer


class GradientWatch:
    """Keeps what the gradients of one epoch's refresh steps have in common.

    Layers that are handed over in the meantime count from their second gradient on: only parameters that both gradients
    have are compared.
    """

    def __init__(self, learner: LocalizedLearner):
        self._learner = learner
        self._last: list[Tensor] = []
        self._mean_before: Tensor | None = None
        self._begin()

    def _begin(self) -> None:
        self._sum: Tensor | None = None
        self._squares = 0.0
        self._count = 0
        self._cosines: list[float] = []
        self._changes: list[float] = []

    def take(self) -> None:
        """Looks at the gradients of a refresh step, before the optimizer does."""
        now = [p.grad.flatten().clone() for p in self._learner.released if p.grad is not None]
        flat = torch.cat(now)
        if self._last:
            common = torch.cat(now[: len(self._last)])
            before = torch.cat(self._last)
            self._cosines.append(float(F.cosine_similarity(common, before, dim=0)))
            self._changes.append(float((common - before).norm() / before.norm()))
        self._last = now
        self._sum = flat if self._sum is None else self._sum + flat
        self._squares += float(flat.square().sum())
        self._count += 1

    def end_epoch(self) -> dict[str, Any]:
        """Figures of the epoch that ended; empty before the first refresh step."""
        if self._sum is None or self._count < 2:
            self._begin()
            return {}
        mean = self._sum / self._count
        power = self._squares / self._count
        # Of n independent gradients the mean's squared length holds 1/n of the noise's.
        signal = (float(mean.square().sum()) - power / self._count) / (1 - 1 / self._count)
        before, self._mean_before = self._mean_before, mean
        shared = None if before is None else F.cosine_similarity(mean[: len(before)], before, dim=0).item()
        figures = {
            "refresh_steps": self._count,
            "cosine": statistics.median(self._cosines),
            "change": statistics.median(self._changes),
            "signal": signal / power,
            "epoch_cosine": shared,
        }
        self._begin()
        return figures


def watched_run(arguments: list[str]) -> list[dict[str, Any]]:
    config = parse_config(arguments)
    check_config(config)
    records = []
    with Trainer(config) as trainer:
        watch = GradientWatch(trainer.learner)
        finish, observe = trainer.refresh.finish_reducing, trainer.decisions.observe

        def finish_and_take() -> None:
            finish()
            watch.take()

        def end_epoch_and_observe(metrics: dict[str, Any]) -> None:
            figures = watch.end_epoch()
            if figures:
                records.append({"epoch": metrics["epoch"] + 1, "boundary": metrics["boundary"]} | figures)
            observe(metrics)

        with (
            mock.patch.object(trainer.refresh, "finish_reducing", finish_and_take),
            mock.patch.object(trainer.decisions, "observe", end_epoch_and_observe),
        ):
            trainer.fit()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options, rest = parser.parse_known_args()
    records = watched_run(rest)
    keys = ["epoch", "boundary", "refresh_steps", "cosine", "change", "signal", "epoch_cosine"]
    table = Table(*keys)
    for record in records:
        table.add_row(*(f"{v:.3f}" if isinstance(v := record[key], float) else str(v) for key in keys))
    Console(width=100).print(table)
    write_json(options.output, environment(torch.device("cpu")) | {"epochs": records})


if __name__ == "__main__":
    main()
