"""Weak supervision (algorithm 2): the training loss decides the sign of localized updates."""

from __future__ import annotations

from typing import Any


class WeakSupervision:
    """+1, and -1 in the epoch after one whose mean training loss rose above the epoch before it."""

    def __init__(self) -> None:
        self.sign = 1.0
        self._previous_loss: float | None = None

    def observe(self, loss: float) -> float:
        """Takes the loss of the epoch that ended and returns the sign for the next one."""
        rose = self._previous_loss is not None and loss > self._previous_loss
        self.sign = -1.0 if rose else 1.0
        self._previous_loss = loss
        return self.sign

    def state_dict(self) -> dict[str, Any]:
        return {"sign": self.sign, "previous_loss": self._previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sign, self._previous_loss = state["sign"], state["previous_loss"]
