"""Mean and sample standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from locsgd_dist.formatting import is_number


@dataclass(frozen=True)
class Summary:
    """A figure over the seeds that have it.

    Attributes:
        per_seed: seed → value.
    """

    per_seed: Mapping[int, float]

    @classmethod
    def of(cls, values: Mapping[int, float | None]) -> Summary:
        """Of the seeds whose value is a finite number."""
        return cls({seed: float(value) for seed, value in sorted(values.items()) if is_number(value)})  # type: ignore[arg-type]

    @property
    def n(self) -> int:
        return len(self.per_seed)

    @property
    def mean(self) -> float | None:
        """None without any value."""
        return statistics.fmean(self.per_seed.values()) if self.per_seed else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation (divisor n - 1); None with fewer than two values."""
        return statistics.stdev(self.per_seed.values()) if self.n > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "sd": self.sd,
            "n": self.n,
            "per_seed": {str(seed): value for seed, value in self.per_seed.items()},
        }
