"""How well the network does on the validation set, once it is the same on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from locsgd_dist.data import Batch, DataBundle
from locsgd_dist.distributed import Replicas, Runtime, pool_buffers
from locsgd_dist.step import Tally, TrainConfig, autocast, evaluation_mode


class Validation:
    """Pools what the ranks hold apart and measures the network; all ranks call every method at the same time.

    Args:
        ema: the moving average of the network, measured beside it; None: there is none.
    """

    UNEVALUATED: dict[str, Any] = {"val_loss": None, "val_top1": None, "eval_seconds": 0.0}

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        ema: AveragedModel | None,
        *,
        replicas: Replicas,
        data: DataBundle,
        runtime: Runtime,
    ):
        self._config = config
        self._model = model
        self._ema = ema
        self._replicas = replicas
        self._data = data
        self._runtime = runtime

    def is_due(self, epoch: int) -> bool:
        """Whether ``epoch`` (from 0) ends with it; the last always does."""
        return epoch + 1 == self._config.epochs or (epoch + 1) % self._config.evaluate_every == 0

    def pool(self, *, with_average: bool) -> None:
        """Makes the network equal on all ranks, and its moving average too where that is about to be evaluated."""
        self._replicas.synchronise()
        pool_buffers(self._model, self._runtime.data_group)
        if self._ema is not None and with_average:
            self._replicas.synchronise_copy(self._ema.module)
            pool_buffers(self._ema, self._runtime.data_group)

    def measure(self, between: Callable[[], None]) -> dict[str, Any]:
        """Loss, accuracy and time, of the network and of its moving average (``ema_...``).

        Args:
            between: called after each batch, on all ranks equally often.
        """
        start = time.perf_counter()
        metrics: dict[str, Any] = {}
        models = {"": self._model} | ({} if self._ema is None else {"ema_": self._ema.module})
        for prefix, model in models.items():
            sums = evaluate(model, self._data.val, self._config, self._runtime.device, between=between)
            # One rank may have fewer batches than another.
            for _ in range(self._data.val.num_rounds - len(self._data.val)):
                between()
            loss, correct, samples = self._runtime.sum(sums)
            metrics |= {f"{prefix}val_loss": loss / samples, f"{prefix}val_top1": correct / samples}
        return metrics | {"eval_seconds": time.perf_counter() - start}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    device: torch.device,
    *,
    between: Callable[[], None] = lambda: None,
) -> list[float]:
    """Cross-entropy, correct answers and samples, summed over this rank's share of a set.

    Args:
        between: called after each batch.
    """
    tally = Tally(device)
    with evaluation_mode(model):
        for batch in batches:
            with autocast(config, device):
                logits = model(batch.images)
            tally.add(F.cross_entropy(logits.float(), batch.targets, reduction="sum"), logits, batch.targets)
            between()
    return tally.sums()
