"""Learning mode selection: where the boundary stands in each epoch.

Every strategy answers one question, ``boundary(epoch)``, and may look at what the epochs before did to the weights.
None of them ever moves the boundary back.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Criterion = Literal["update_norm", "relative_drift", "rate_normalised", "loss_plateau"]
AnnealScale = Literal["none", "equal_area"]


@dataclass(frozen=True)
class SelectionConfig:
    """When layers go over from SGD to localized learning."""

    kind: Literal["dynamic", "static", "linear", "fixed", "replay"] = "dynamic"
    """dynamic (algorithm 1), static (quadratic in the epoch), linear (in the epoch), fixed (one boundary) or replay (a
    recorded trace)."""
    criterion: Criterion = "update_norm"
    """dynamic, what is compared with its recent mean: update_norm of the transition layer (the paper's), relative_drift
    (that over the weight's norm), rate_normalised (that over the epoch's sum of learning rates) or loss_plateau (the
    training loss, which fires when it no longer falls)."""
    alpha: float = 0.95
    """dynamic: shift when the criterion is at most alpha times its recent mean (loss_plateau: at least); > 0."""
    lmax: float = 0.75
    """Largest share of the layers that may learn locally; in [0, 1]. It does not bind fixed with a
    boundary given, nor replay."""
    start_epoch: int = 0
    """All but replay: first epoch (from 0) in which layers may learn locally; >= 0."""
    tshift: Literal["block"] | int = "block"
    """dynamic, linear: layers per shift: block (one recurring block of the network) or a whole number >= 1."""
    window: Literal["printed", "mean"] = "mean"
    """dynamic: printed (the paper's K+1 terms over a divisor K) or mean (of the last max(2, K) epochs)."""
    c1: float | None = None
    """static: boundary at the last epoch, in layers (default lmax * L)."""
    c2: float | None = None
    """static: curvature, in layers per squared epoch (default: the boundary is 0 in selection.start_epoch)."""
    full_at: float = 1.0
    """linear: share of the run after which lmax * L layers learn locally; in (0, 1]."""
    boundary: int | None = 0
    """fixed: the boundary, in layers; >= 0, or null for lmax * L."""
    trace: str | None = None
    """replay: a run directory, its metrics.jsonl, or a JSON list of one boundary per epoch."""
    anneal: bool = False
    """All but dynamic: each layer's learning rate falls to 0 on a cosine of its own, which ends when it is handed over,
    in the place of optim.schedule (FreezeOut)."""
    anneal_scale: AnnealScale = "none"
    """Learning rate with which an annealed layer starts: optim.lr, or equal_area, optim.lr over the share of the run
    after which it is handed over: each layer's rate then has the same sum as a cosine over the whole run."""

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"selection.alpha must be > 0, got {self.alpha}")
        if self.criterion == "loss_plateau" and self.window == "printed":
            raise ValueError("selection.criterion=loss_plateau needs selection.window=mean: printed is no mean")
        if not 0 <= self.lmax <= 1:
            raise ValueError(f"selection.lmax must lie in [0, 1], got {self.lmax}")
        if self.tshift != "block" and self.tshift < 1:
            raise ValueError(f"selection.tshift must be block or a whole number >= 1, got {self.tshift!r}")
        for key in ("c1", "c2"):
            value = getattr(self, key)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"selection.{key} must be >= 0, got {value}")
        if not 0 < self.full_at <= 1:
            raise ValueError(f"selection.full_at must lie in (0, 1], got {self.full_at}")
        if self.boundary is not None and self.boundary < 0:
            raise ValueError(f"selection.boundary must be >= 0 or null, got {self.boundary}")
        if self.start_epoch < 0:
            raise ValueError(f"selection.start_epoch must be >= 0, got {self.start_epoch}")
        if self.kind == "replay" and self.trace is None:
            raise ValueError("selection.trace must name a run directory or a boundary trace when selection.kind=replay")
        if self.anneal and self.kind == "dynamic":
            raise ValueError(
                "selection.anneal=true needs hand-overs known in advance: selection.kind must be static, linear, fixed "
                "or replay, got dynamic"
            )


class Selector(Protocol):
    """Places the boundary. ``boundary`` is the one in force."""

    boundary: int

    def observe(self, epoch: int, values: Sequence[float]) -> int:
        """Takes what ``epoch`` (from 0) did and returns the boundary of the next one.

        Args:
            epoch: the epoch that ended.
            values: what :func:`criterion_values` makes of that epoch, for every layer in execution order.
        """
        ...

    def start(self, epoch: int) -> int:
        """The boundary of ``epoch``, which no epoch of this configuration may have come before: a checkpoint may be of
        another's run."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_selector(config: SelectionConfig, *, num_layers: int, block_size: int, epochs: int) -> Selector:
    """The selector that ``config`` describes, for a network of ``num_layers`` trained for ``epochs``.

    Raises:
        ValueError: ``selection.boundary`` or a replayed boundary lies beyond the network, or the trace is unreadable.
    """
    schedule = scheduled_boundaries(config, num_layers=num_layers, block_size=block_size, epochs=epochs)
    if schedule is not None:
        return ScheduledSelector(schedule)
    return DynamicSelector(
        layers_per_shift(config, block_size),
        largest_boundary(config.lmax, num_layers),
        shift_interval(config, num_layers=num_layers, block_size=block_size, epochs=epochs),
        alpha=config.alpha,
        window=config.window,
        start_epoch=config.start_epoch,
        rising=config.criterion == "loss_plateau",
    )


def scheduled_boundaries(config: SelectionConfig, *, num_layers: int, block_size: int, epochs: int) -> list[int] | None:
    """The boundary of each epoch where it is known in advance; None for ``selection.kind=dynamic``. A replayed trace
    may be longer or shorter than the run: its last boundary holds.

    Raises:
        ValueError: as :func:`make_selector`.
    """
    limit, start = largest_boundary(config.lmax, num_layers), config.start_epoch
    match config.kind:
        case "dynamic":
            return None
        case "static":
            c1 = config.lmax * num_layers if config.c1 is None else config.c1
            c2 = c1 / max(1, epochs - 1 - start) ** 2 if config.c2 is None else config.c2
            return [static_boundary(e, epochs, c1, c2, limit) if e >= start else 0 for e in range(epochs)]
        case "linear":
            shift, full = layers_per_shift(config, block_size), config.full_at * (epochs - 1)
            return [linear_boundary(e, start, full, shift, limit) for e in range(epochs)]
        case "fixed":
            boundary = limit if config.boundary is None else config.boundary
            if boundary > num_layers:
                raise ValueError(
                    f"selection.boundary must be at most {num_layers}, the network's layers, got {config.boundary}"
                )
            return [boundary if e >= start else 0 for e in range(epochs)]
        case "replay":
            assert config.trace is not None
            trace = load_boundary_trace(Path(config.trace))
            if max(trace) > num_layers:
                raise ValueError(
                    f"selection.trace holds the boundary {max(trace)}, but the network has {num_layers} layers"
                )
            return trace


def criterion_values(
    criterion: Criterion, *, update_norms: Sequence[float], norms: Sequence[float], sum_of_lr: float, loss: float
) -> list[float]:
    """What dynamic selection compares with its recent mean, for every layer.

    Args:
        update_norms: L2 norm of each layer's weight change over the epoch (u of algorithm 1).
        norms: L2 norm of each layer's weight at its end.
        sum_of_lr: of the epoch's learning rates, step by step.
        loss: mean training loss of the epoch.

    Returns:
        Values that are not numbers where there is nothing to divide by: they never fire.
    """
    match criterion:
        case "update_norm":
            return list(update_norms)
        case "relative_drift":
            return [u / n if n > 0 else math.nan for u, n in zip(update_norms, norms, strict=True)]
        case "rate_normalised":
            return [u / sum_of_lr if sum_of_lr > 0 else math.nan for u in update_norms]
        case "loss_plateau":
            return [loss] * len(update_norms)


def largest_boundary(lmax: float, num_layers: int) -> int:
    """Largest boundary that ``lmax`` allows: the floor of ``lmax * L``, immune to the product's rounding."""
    return math.floor(lmax * num_layers + 1e-9)


def layers_per_shift(config: SelectionConfig, block_size: int) -> int:
    """t_shift, in layers."""
    return block_size if config.tshift == "block" else config.tshift


def shift_interval(config: SelectionConfig, *, num_layers: int, block_size: int, epochs: int) -> int:
    """K, the least number of epochs between two shifts: ``floor(E_max / (L_max * L / t_shift))``, at least 1.

    E_max are the epochs from ``start_epoch`` on, so that a later start still reaches L_max * L.
    """
    reach, left = config.lmax * num_layers, max(1, epochs - config.start_epoch)
    return max(1, math.floor(left * layers_per_shift(config, block_size) / reach + 1e-9)) if reach > 0 else left


def static_boundary(epoch: int, epochs: int, c1: float, c2: float, limit: int) -> int:
    """Boundary in ``epoch`` (from 0) under the quadratic schedule of appendix 6.5: ``max(0, c1 - c2 (E - E_max)^2)``.

    The paper counts epochs from 1, so that the last one has ``E = E_max`` and the boundary c1.
    """
    return min(limit, max(0, math.floor(c1 - c2 * (epoch + 1 - epochs) ** 2 + 1e-9)))


def linear_boundary(epoch: int, start: int, full: float, shift: int, limit: int) -> int:
    """Boundary in ``epoch`` (from 0): from 0 in epoch ``start`` to ``limit`` in epoch ``full``, in whole shifts."""
    if epoch < start:
        return 0
    if epoch >= full - 1e-9:
        return limit
    return math.floor(limit * (epoch - start) / (full - start) / shift + 1e-9) * shift


def load_boundary_trace(path: Path) -> list[int]:
    """One boundary per epoch from a run directory, its metrics.jsonl or a JSON list.

    Raises:
        ValueError: the file is missing, empty, not readable as a trace, or its boundary falls.
    """
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            trace = [json.loads(line)["boundary"] for line in text.splitlines() if line.strip()]
        else:
            trace = json.loads(text)
    except OSError as error:
        raise ValueError(f"selection.trace cannot be read: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"selection.trace must be a run's metrics.jsonl or a JSON list of boundaries: {path}"
        ) from None
    if not isinstance(trace, list) or not trace or not all(type(t) is int and t >= 0 for t in trace):
        raise ValueError(f"selection.trace must hold one boundary >= 0 per epoch: {path}")
    if any(b < a for a, b in itertools.pairwise(trace)):
        raise ValueError(f"selection.trace holds a boundary that falls, which no run can follow: {path}")
    return trace


class DynamicSelector:
    """Algorithm 1: shift once the transition layer's update norm, or another criterion, falls below its recent mean.

    Args:
        shift: layers per shift (t_shift).
        limit: largest boundary (L_max * L).
        interval: K, the least number of epochs between two shifts.
        alpha: of the criterion ``u <= alpha * mean``.
        window: ``printed`` sums the last K+1 epochs and divides by K; ``mean`` is the mean of the last max(2, K).
        start_epoch: first epoch whose boundary may lie above 0.
        rising: the criterion is ``u >= alpha * mean``: for numbers that fall as long as a layer learns.
    """

    def __init__(
        self,
        shift: int,
        limit: int,
        interval: int,
        *,
        alpha: float,
        window: str,
        start_epoch: int = 0,
        rising: bool = False,
    ):
        self.boundary = 0
        self._start_epoch = start_epoch
        self._rising = rising
        self._shift = shift
        self._limit = limit
        self._interval = interval
        self._alpha = alpha
        self._printed = window == "printed"
        self._epochs_since_shift = 0
        self._history: list[list[float]] = []

    def observe(self, epoch: int, values: Sequence[float]) -> int:
        self._epochs_since_shift += 1
        length = self._interval + 1 if self._printed else max(2, self._interval)
        self._history = [*self._history, list(values)][-length:]
        if epoch + 1 >= self._start_epoch and self._fires():
            self.boundary = min(self.boundary + self._shift, self._limit)
            self._epochs_since_shift = 0
        return self.boundary

    def start(self, epoch: int) -> int:
        return self.boundary

    def _fires(self) -> bool:
        if self.boundary >= self._limit or self._epochs_since_shift < self._interval:
            return False
        # Every SGD layer's value is recorded, so that the window speaks of one layer also right after a shift.
        window = [values[self.boundary] for values in self._history]
        if len(window) < 2:
            return False
        mean = sum(window) / (self._interval if self._printed else len(window))
        return window[-1] >= self._alpha * mean if self._rising else window[-1] <= self._alpha * mean

    def state_dict(self) -> dict[str, Any]:
        return {
            "boundary": self.boundary,
            "epochs_since_shift": self._epochs_since_shift,
            "history": [list(values) for values in self._history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.boundary = state["boundary"]
        self._epochs_since_shift = state["epochs_since_shift"]
        self._history = [list(values) for values in state["history"]]


class ScheduledSelector:
    """A boundary known in advance for each epoch (every kind but dynamic). The last one holds for later epochs."""

    def __init__(self, schedule: Sequence[int]):
        self._schedule = list(schedule)
        self.boundary = self._schedule[0] if self._schedule else 0

    def observe(self, epoch: int, values: Sequence[float]) -> int:
        return self.start(epoch + 1)

    def start(self, epoch: int) -> int:
        if self._schedule:
            self.boundary = max(self.boundary, self._schedule[min(epoch, len(self._schedule) - 1)])
        return self.boundary

    def state_dict(self) -> dict[str, Any]:
        return {"boundary": self.boundary}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.boundary = state["boundary"]
