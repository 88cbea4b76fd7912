"""Where a comparison strategy takes part in training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from locsgd_dist.baselines.surgery import Surgery
from locsgd_dist.step import Tally


class Baseline:
    """A strategy's part in training. This one takes none, so that the loop need not ask which is at work.

    Every rank calls every method at the same time.

    Attributes:
        skipped: parameters that the step under way leaves without a gradient, on every rank alike; None where a
            strategy never skips any.
    """

    skipped: set[nn.Parameter] | None = None

    def step(self, samples_seen: int, tally: Tally) -> AbstractContextManager[None]:
        """Around one optimizer step.

        Args:
            samples_seen: samples trained on before the step.
            tally: where the step adds its loss.
        """
        return nullcontext()

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a step, a scalar; None for nothing."""
        return None

    def end_epoch(self, epoch: int) -> Surgery | None:
        """After the training of ``epoch`` (from 0), all ranks holding the same network: what has been cut off it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave. Call it before weights are loaded: the network may change shape."""
