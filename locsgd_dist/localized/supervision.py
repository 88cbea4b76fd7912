"""Weak supervision: what decides the sign of localized updates, once an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class WeakSupervision:
    """The sign of localized updates in the next epoch, +1 or -1: by the training loss or by the measured alignment.

    Whoever uses neither method has a sign of +1 throughout.
    """

    def __init__(self) -> None:
        self.sign = 1.0
        self._previous_loss: float | None = None

    def observe(self, loss: float) -> float:
        """Algorithm 2: -1 after an epoch whose mean training loss rose above that of the epoch before it, else +1."""
        rose = self._previous_loss is not None and loss > self._previous_loss
        self.sign = -1.0 if rose else 1.0
        self._previous_loss = loss
        return self.sign

    def follow(self, alignment: Sequence[float | None]) -> float:
        """Turns the sign round after an epoch in which the steps led uphill in the mean over layers.

        Args:
            alignment: of each layer's steps, their sign included, with the descent direction; None where it was not
                measured. Where none was, the sign stays.
        """
        measured = [cosine for cosine in alignment if cosine is not None]
        if sum(measured) < 0:
            self.sign = -self.sign
        return self.sign

    def state_dict(self) -> dict[str, Any]:
        return {"sign": self.sign, "previous_loss": self._previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sign, self._previous_loss = state["sign"], state["previous_loss"]
