"""Section `faults` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FaultConfig:
    """What a run puts up with."""

    max_bad_steps: int = 25
    """Consecutive steps whose loss or gradient is not finite, all of them skipped, after which the run stops; >= 1."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """When the network has collapsed: warn (an event, a line, the report) or stop (that, then a checkpoint and the
    run's end; warn lets it go on from there)."""
    collapse_loss: float = 0.25
    """The loss has collapsed when no more than this share is left of the most by which training loss has been below
    chance, the logarithm of the number of classes; in [0, 1). A run that has never been a fifth below it cannot."""
    collapse_epochs: int = 2
    """Consecutive epochs for which that holds; >= 1."""
    collapse_rank: float = 0.05
    """A localized layer's weights have collapsed into one direction when no more than this share is left of their
    effective rank above 1 at the layer's hand-over; in [0, 1)."""
    collapse_norm: float = 10.0
    """A localized layer's weights are gone, or have exploded, when their norm has changed by this factor or more since
    the layer's hand-over; > 1."""

    def __post_init__(self) -> None:
        for key in ("max_bad_steps", "collapse_epochs"):
            if getattr(self, key) < 1:
                raise ValueError(f"faults.{key} must be >= 1, got {getattr(self, key)}")
        for key in ("collapse_loss", "collapse_rank"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"faults.{key} must lie in [0, 1), got {getattr(self, key)}")
        if not self.collapse_norm > 1:
            raise ValueError(f"faults.collapse_norm must be > 1, got {self.collapse_norm}")
