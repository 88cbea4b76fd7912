"""What the run will do, epoch by epoch: where the boundary stands, and when the batch grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from locsgd_dist.config import Config
from locsgd_dist.localized import LayerMap, make_selector
from locsgd_dist.localized.selection import shift_interval
from locsgd_dist.memory import BatchConfig, BatchPolicy

Pace = Literal["dynamic", "static", "linear", "fixed", "replay"]


@dataclass(frozen=True)
class PlannedEpoch:
    """Boundary and per-GPU batch in force in one epoch, and the footprint that goes with them."""

    epoch: int
    boundary: int
    per_gpu: int
    footprint: int


def boundaries_per_epoch(
    config: Config, layers: LayerMap, pace: Pace | None = None, trace: Path | None = None
) -> list[int]:
    """The boundary of every epoch. The dynamic pace is the fastest there is: it fires at every chance.

    Args:
        config: the run.
        layers: its network's.
        pace: in the place of ``selection.kind``.
        trace: a recorded run or list of boundaries, in the place of both.

    Raises:
        ValueError: the trace cannot be read or does not fit the network.
    """
    epochs = config.train.epochs
    if config.localized.rule == "none":
        return [0] * epochs
    selection = config.selection
    if trace is not None:
        selection = replace(selection, kind="replay", trace=str(trace))
    elif pace is not None:
        selection = replace(selection, kind=pace, anneal=False)
    selector = make_selector(selection, num_layers=len(layers), block_size=layers.block_size, epochs=epochs)
    boundaries = [selector.boundary]
    for epoch in range(epochs - 1):
        # Zeros always satisfy u <= alpha * mean, and >= too: algorithm 1 then waits for its interval only.
        boundaries.append(selector.observe(epoch, [0.0] * len(layers)))
    return boundaries


def interval_epochs(config: Config, layers: LayerMap) -> int:
    """K: the least number of epochs between two shifts, and between two changes of the batch."""
    return shift_interval(
        config.selection, num_layers=len(layers), block_size=layers.block_size, epochs=config.train.epochs
    )


def planned_epochs(
    boundaries: Sequence[int],
    footprint: Callable[[int, int], int],
    batch: BatchConfig,
    *,
    interval: int,
    num_train: int,
    batches_per_step: int,
    memory_bytes: int | None,
) -> list[PlannedEpoch]:
    """Asks the trainer's own batch policy at each epoch's edge, footprints foretold in the place of trial steps.

    Args:
        boundaries: of each epoch.
        footprint: bytes at a boundary and a per-GPU batch.
        memory_bytes: a trial that needs more has run out of memory.
    """
    policy = BatchPolicy(batch, interval=interval, num_train=num_train, batches_per_step=batches_per_step)
    planned: list[PlannedEpoch] = []
    for epoch, boundary in enumerate(boundaries):
        planned.append(PlannedEpoch(epoch, boundary, policy.per_gpu, footprint(boundary, policy.per_gpu)))
        policy.observe(planned[-1].footprint)
        if epoch + 1 == len(boundaries):
            break
        following = boundaries[epoch + 1]
        candidate = policy.propose(epoch, footprint(following, policy.per_gpu))
        while candidate is not None:
            needed = footprint(following, candidate)
            candidate = policy.judge(candidate, None if memory_bytes is not None and needed > memory_bytes else needed)
    return planned
