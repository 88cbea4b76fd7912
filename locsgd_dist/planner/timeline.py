"""Every byte of one training step over time, and what it is for, as a function of the batch."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from locsgd_dist.memory.tensor_bytes import TensorByteTracker

Bytes = npt.NDArray[np.int64]


class Use(IntEnum):
    """What a storage is for."""

    PARAMETERS = 0
    GRADIENTS = 1
    OPTIMIZER_STATE = 2
    ACTIVATIONS = 3
    TEMPORARY = 4


@dataclass(frozen=True)
class MemoryParts:
    """Bytes alive at the highest moment of a step.

    Attributes:
        parameters: parameters, buffers, and their moving average where one is kept.
        gradients: those that exist at that moment; under DDP all buckets, which live as long as the wrapper.
        optimizer_state: momentum, second moments.
        activations: what autograd keeps for the backward pass, the network's input included where it is kept.
        temporary: everything else: results on their way, localized updates, buffers of the exchange of replicas.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """The footprint."""
        return self.parameters + self.gradients + self.optimizer_state + self.activations + self.temporary


class StepTracker(TensorByteTracker):
    """Also writes down when each storage comes and goes, and what it is for.

    One step of one thread; the cyclic garbage collector must rest meanwhile (:meth:`quiet`), so that two steps of the
    same network write the same log.
    """

    def __init__(self, *, rounding: int = 1) -> None:
        super().__init__(rounding=rounding)
        self._changes: list[int] = []
        self._storages: list[int] = []
        self._uses: list[Use] = []
        self._number_of: dict[int, int] = {}
        self._older: list[tuple[int, int]] = []

    def holding(self, tensors: Iterable[Tensor], use: Use) -> None:
        """Counts tensors that live already as being for ``use``; the first use named for a storage stands."""
        before = len(self._uses)
        self.baseline(tensors)
        self._uses[before:] = [use] * (len(self._uses) - before)

    def mark(self, tensor: Tensor, use: Use) -> None:
        """Says what a temporary tensor turned out to be for."""
        number = self._number_of.get(tensor.untyped_storage()._cdata)
        if number is not None and self._uses[number] is Use.TEMPORARY:
            self._uses[number] = use

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Tracks inside, marks what autograd saves, and keeps the garbage collector from choosing its moment."""
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor), self:
                yield
        finally:
            if was_enabled:
                gc.enable()

    def log(self) -> StepLog:
        """What happened so far."""
        order = [*self._older, *zip(self._storages, self._changes, strict=True)]
        uses = np.array([self._uses[number] for number, _ in order], dtype=np.int64)
        return StepLog(np.array([change for _, change in order], dtype=np.int64), uses)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.mark(tensor, Use.ACTIVATIONS)
        return tensor

    def _note(self, tensor: Tensor, *, older: bool) -> None:
        before = self.current_bytes
        super()._note(tensor, older=older)
        change = self.current_bytes - before
        if not change:
            return
        key = tensor.untyped_storage()._cdata
        if key in self._number_of:
            self._record(self._number_of[key], change)
            return
        number = self._number_of[key] = len(self._uses)
        self._uses.append(Use.TEMPORARY)
        if older:  # it was there all along, whenever it is first read
            self._older.append((number, change))
        else:
            self._record(number, change)

    def _forget(self, ref: Any) -> None:
        super()._forget(ref)
        number = self._number_of.pop(ref.key, None)
        if number is not None:
            self._record(number, -ref.num_bytes)

    def _record(self, number: int, change: int) -> None:
        self._storages.append(number)
        self._changes.append(change)


@dataclass(frozen=True, eq=False)
class StepLog:
    """Changes of live memory in their order, and what each is for.

    Attributes:
        changes: [events] bytes that come (positive) or go.
        uses: [events] a :class:`Use` each.
    """

    changes: Bytes
    uses: Bytes


class DearestStep:
    """Memory of a run whose steps differ in kind: of the one that needs most at each batch."""

    def __init__(self, kinds: Sequence[StepMemory]):
        self._kinds = kinds

    def at(self, batch: int) -> MemoryParts:
        """The highest moment of the dearest step on ``batch`` images per GPU."""
        return max((kind.at(batch) for kind in self._kinds), key=lambda parts: parts.total)

    def largest_batch(self, num_bytes: int) -> int:
        """The largest batch with which every step fits into ``num_bytes``; 0 where not even one image does."""
        return min(kind.largest_batch(num_bytes) for kind in self._kinds)


class StepMemory:
    """Memory of one step as a function of the per-GPU batch, from its logs at two batches.

    The same operations run at every batch, and each tensor is affine in it; so the whole course of the step, not only
    its peak, is known at any batch. (The peak itself is not affine: another moment may become the highest.)

    Raises:
        ValueError: the two steps did not run the same operations.
    """

    def __init__(self, batches: tuple[int, int], logs: tuple[StepLog, StepLog]):
        if not np.array_equal(logs[0].uses, logs[1].uses):
            raise ValueError(
                f"model.name: the network runs other operations on {batches[1]} images than on {batches[0]}: "
                "its memory cannot be foretold"
            )
        self._batches = batches
        self._changes = tuple(log.changes for log in logs)
        self._uses = logs[0].uses

    def at(self, batch: int) -> MemoryParts:
        """The highest moment of a step on ``batch`` images per GPU."""
        changes = self._changes_at(batch)
        peak = int(np.argmax(np.cumsum(changes)))
        until_peak = np.bincount(self._uses[: peak + 1], weights=changes[: peak + 1], minlength=len(Use))
        return MemoryParts(*(round(part) for part in until_peak))

    def largest_batch(self, num_bytes: int) -> int:
        """The largest batch whose footprint is at most ``num_bytes``; 0 where not even one image fits."""
        if not self._fits(1, num_bytes):
            return 0
        fits, too_large = 1, 2
        while self._fits(too_large, num_bytes):
            fits, too_large = too_large, 2 * too_large
            if fits >= 1 << 30:  # a network that keeps nothing of its input: no batch is too large
                return fits
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            fits, too_large = (middle, too_large) if self._fits(middle, num_bytes) else (fits, middle)
        return fits

    def _fits(self, batch: int, num_bytes: int) -> bool:
        return int(np.cumsum(self._changes_at(batch)).max(initial=0)) <= num_bytes

    def _changes_at(self, batch: int) -> npt.NDArray[np.float64]:
        first, second = self._batches
        slope = (self._changes[1] - self._changes[0]) / (second - first)
        return self._changes[0] + slope * (batch - first)
