"""Section `faults` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultConfig:
    """What a run puts up with."""

    max_bad_steps: int = 25
    """Consecutive steps whose loss or gradient is not finite, all of them skipped, after which the run stops; >= 1."""

    def __post_init__(self) -> None:
        if self.max_bad_steps < 1:
            raise ValueError(f"faults.max_bad_steps must be >= 1, got {self.max_bad_steps}")
