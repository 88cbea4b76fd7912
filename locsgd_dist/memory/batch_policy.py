"""When the per-GPU batch grows: the footprint has fallen, a trial step says that the larger batch fits.

The policy only decides. It is asked at an epoch's edge, names a candidate, is told what a trial step of that size
needed, the most of all ranks, and names another or is content:

    candidate = policy.propose(epoch, footprint)
    while candidate is not None:
        candidate = policy.judge(candidate, trial(candidate))   # bytes, or None where a rank ran out of memory

Every number it sees is one that all ranks share, so all ranks decide alike.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

LrScaling = Literal["linear", "sqrt", "none"]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class BatchConfig:
    """How many images each rank takes in a step, and when that number grows."""

    per_gpu: int = 64
    """Images per rank and step at the start; >= 1."""
    policy: Literal["fixed", "halving", "fit"] = "fixed"
    """fixed; halving (double once the footprint is at most half of the budget: the paper's) or fit (any multiple that a
    line through measured footprints predicts to stay under batch.headroom of the budget)."""
    memory_budget: str | None = None
    """Bytes per GPU to stay under, such as 10GiB (null: the footprint of the first epochs)."""
    headroom: float = 0.9
    """fit: share of the budget that may be used; in (0, 1]."""
    max_per_gpu: int | None = None
    """Never more images per rank and step than this (null: no limit)."""
    min_steps: int = 10
    """Never so large a batch that an epoch has fewer steps than this; >= 1."""
    interval_epochs: int | None = None
    """Least number of epochs between two changes (null: K, the interval of the learning mode selection)."""
    lr_scaling: LrScaling = "linear"
    """How the learning rate follows the global batch, relative to the one at the start."""
    lr_ramp_epochs: float = 1.0
    """Epochs over which the learning rate reaches its new scale after a change; >= 0."""

    def __post_init__(self) -> None:
        for key in ("per_gpu", "min_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"batch.{key} must be at least 1, got {getattr(self, key)}")
        if self.max_per_gpu is not None and self.max_per_gpu < self.per_gpu:
            raise ValueError(f"batch.max_per_gpu must be at least batch.per_gpu={self.per_gpu}, got {self.max_per_gpu}")
        if self.interval_epochs is not None and self.interval_epochs < 1:
            raise ValueError(f"batch.interval_epochs must be at least 1 (or null), got {self.interval_epochs}")
        if not 0 < self.headroom <= 1:
            raise ValueError(f"batch.headroom must lie in (0, 1], got {self.headroom}")
        if not 0 <= self.lr_ramp_epochs < math.inf:
            raise ValueError(f"batch.lr_ramp_epochs must be >= 0, got {self.lr_ramp_epochs}")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "batch.memory_budget")


@dataclass(frozen=True)
class ElasticConfig:
    """What follows when a run goes on with another number of ranks."""

    keep: Literal["per_gpu", "global"] = "per_gpu"
    """per_gpu: each rank goes on with its batch, and learning rates follow the global batch (batch.lr_scaling); global:
    the per-GPU batch follows, so that the global batch stays, to the nearest whole image, up to batch.max_per_gpu and
    what is not known not to fit; learning rates follow what is missing."""


def parse_bytes(text: str, key: str) -> int:
    """Bytes of ``10GiB``, ``800 MB`` or a plain number.

    Raises:
        ValueError: not a size; ``key`` is named.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{key} must be a size such as 10GiB or 800MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class BatchPolicy:
    """Decides the per-GPU batch at epoch edges.

    Args:
        config: the ``batch`` section.
        interval: least number of epochs between two changes, where the configuration names none.
        num_train: images of an epoch.
        batches_per_step: per-GPU batches in one optimizer step: world size * gradient accumulation.

    Attributes:
        per_gpu: the per-GPU batch in force.
    """

    def __init__(self, config: BatchConfig, *, interval: int, num_train: int, batches_per_step: int):
        self.per_gpu = config.per_gpu
        self._config = config
        self._interval = config.interval_epochs or interval
        self._num_train = num_train
        self._batches_per_step = batches_per_step
        self._budget = parse_bytes(config.memory_budget, "batch.memory_budget") if config.memory_budget else None
        self._first_footprint = 0
        self._sizes = [config.per_gpu]
        self._limit: int | None = None
        self._last_change = -1
        self._epoch = -1
        self._footprint = 0
        self._best_trial: tuple[int, int] | None = None

    @property
    def budget(self) -> int:
        """Bytes per GPU to stay under."""
        return self._first_footprint if self._budget is None else self._budget

    @property
    def previous_size(self) -> int | None:
        """The largest batch known to work below the present one; None at the first."""
        return self._sizes[-2] if len(self._sizes) > 1 else None

    def observe(self, footprint: int) -> None:
        """Takes the footprint of an epoch that was trained at the starting batch, or, where the number of ranks changed
        before one was over, of the first: the budget, if none is configured."""
        if len(self._sizes) == 1 or not self._first_footprint:
            self._first_footprint = max(self._first_footprint, footprint)

    def is_due(self, epoch: int) -> bool:
        """Whether a change may be considered after ``epoch`` (from 0); ask before paying for a measurement."""
        return (
            self._config.policy != "fixed"
            and epoch - self._last_change >= self._interval
            and self._allowed(2 * self.per_gpu if self._config.policy == "halving" else self.per_gpu + 1)
        )

    def propose(self, epoch: int, footprint: int) -> int | None:
        """The per-GPU batch to try after ``epoch``, or None to stay.

        Args:
            epoch: the epoch that ended, from 0.
            footprint: bytes of a step at the present batch and the next epoch's boundary; MAX over ranks.
        """
        if not self.is_due(epoch):
            return None
        self._epoch, self._footprint, self._best_trial = epoch, footprint, None
        if self._config.policy == "fit":
            return self._fitted()
        return 2 * self.per_gpu if 2 * footprint <= self.budget else None

    def judge(self, candidate: int, footprint: int | None) -> int | None:
        """Takes a trial step's footprint (None: out of memory); names the next candidate, or None: done."""
        bound = self.budget * (self._config.headroom if self._config.policy == "fit" else 1.0)
        if footprint is None or footprint > bound:
            self._limit = candidate
            self._last_change = self._epoch
        elif self._best_trial is None or candidate > self._best_trial[0]:
            self._best_trial = (candidate, footprint)
            if self._config.policy == "fit" and (larger := self._fitted()) is not None and larger > candidate:
                return larger
        if self._best_trial is not None:
            self._grow(self._best_trial[0])
        return None

    def fall_back(self, failed: int) -> bool:
        """After a step of ``failed`` images ran out of memory: back to the last size that worked, for good.

        Returns:
            False where no smaller size is known to work.
        """
        self._limit = min(failed, self._limit or failed)
        while len(self._sizes) > 1 and self._sizes[-1] >= self._limit:
            self._sizes.pop()
        self.per_gpu = self._sizes[-1]
        return self.per_gpu < self._limit

    def keep_global_batch(self, ranks_before: int, ranks_now: int) -> None:
        """The number of ranks has changed: the per-GPU batch follows, as far as it may and is not known not to fit.
        What worked before is still known to work."""
        wanted = round(self.per_gpu * ranks_before / ranks_now)
        bounds = [self._config.max_per_gpu, None if self._limit is None else self._limit - 1]
        per_gpu = max(1, min([wanted, *(bound for bound in bounds if bound is not None)]))
        self._sizes = [*(size for size in self._sizes if size < per_gpu), per_gpu]
        self.per_gpu = per_gpu

    def _grow(self, per_gpu: int) -> None:
        self.per_gpu = per_gpu
        self._sizes.append(per_gpu)
        self._last_change = self._epoch

    def _allowed(self, per_gpu: int) -> bool:
        steps = math.ceil(self._num_train / (per_gpu * self._batches_per_step))
        return (
            steps >= self._config.min_steps
            and per_gpu <= (self._config.max_per_gpu or per_gpu)
            and (self._limit is None or per_gpu < self._limit)
        )

    def _fitted(self) -> int | None:
        """The largest whole multiple of the starting batch that a line through the measured footprints lets in."""
        bound = self._config.headroom * self.budget
        unit = self._config.per_gpu
        if self._best_trial is None:
            # Through the origin: what does not grow with the batch is taken to grow, which errs on the safe side.
            per_image, fixed = self._footprint / self.per_gpu, 0.0
        else:
            size, trial = self._best_trial
            per_image = max(1.0, (trial - self._footprint) / (size - self.per_gpu))
            fixed = self._footprint - per_image * self.per_gpu
        largest = int((bound - fixed) / per_image) // unit * unit
        while largest > self.per_gpu and not self._allowed(largest):
            largest -= unit
        return largest if largest > self.per_gpu else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "sizes": list(self._sizes),
            "limit": self._limit,
            "first_footprint": self._first_footprint,
            "last_change": self._last_change,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sizes = list(state["sizes"])
        self.per_gpu = self._sizes[-1]
        self._limit = state["limit"]
        self._first_footprint = state["first_footprint"]
        self._last_change = state["last_change"]


class LrScale:
    """Factor on a learning rate that follows the global batch, reached over a ramp after each change.

    torch's SGD multiplies the velocity by the rate at each step, so that momentum owes no correction.

    Args:
        kind: ``linear`` (factor = growth of the global batch), ``sqrt`` or ``none``.
        ramp_epochs: length of the ramp.
    """

    def __init__(self, kind: LrScaling, ramp_epochs: float):
        self._kind = kind
        self._ramp_epochs = ramp_epochs
        self._from = self._to = 1.0
        self._start = 0.0

    def set_growth(self, growth: float, epoch: float) -> None:
        """The global batch is ``growth`` times the configured one from ``epoch`` (fractions count) on."""
        self._from = self.at(epoch)
        self._to = {"linear": growth, "sqrt": math.sqrt(growth), "none": 1.0}[self._kind]
        self._start = epoch

    def at(self, epoch: float) -> float:
        """The factor at ``epoch``."""
        passed = (epoch - self._start) / self._ramp_epochs if self._ramp_epochs > 0 else 1.0
        return self._from + (self._to - self._from) * min(1.0, max(0.0, passed))

    def state_dict(self) -> dict[str, float]:
        return {"from": self._from, "to": self._to, "start": self._start}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._from, self._to, self._start = state["from"], state["to"], state["start"]
