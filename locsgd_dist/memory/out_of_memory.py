"""Out of memory in the middle of a step.

A rank that fails there cannot tell its peers over the data group: they are inside a collective on it, and would wait
for one more that never comes. It leaves instead. It writes down which batch did not fit, and exits; torchrun stops its
peers, whatever they wait in, and starts all ranks anew; they go on from the newest checkpoint with the last batch that
worked. That is the same path that a killed process takes, on every backend, and it cannot deadlock.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from locsgd_dist.recording.directory import write_atomically

log = logging.getLogger(__name__)


class StepOutOfMemoryError(Exception):
    """A training step did not fit; what is needed to go on has been written down."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The host's allocator has no exception type of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@dataclass(frozen=True)
class Incident:
    """One rank ran out of memory at a batch of ``per_gpu``."""

    rank: int
    per_gpu: int
    time: float


class OutOfMemoryLog:
    """The incidents of a run, one file each in its directory, so that any rank can write down its own."""

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, rank: int, per_gpu: int) -> None:
        """Writes an incident down, whole or not at all: on a full disk the next start learns nothing of it."""
        incident = {"rank": rank, "per_gpu": per_gpu, "time": time.time()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"rank{rank}-{time.time_ns()}.json", json.dumps(incident))
        except OSError as error:
            log.warning("%s: the batch that did not fit could not be written down: %s", self._folder, error)

    def read(self) -> list[Incident]:
        """All incidents so far, in the order in which they happened; what cannot be read is passed over."""
        found = []
        for path in self._folder.glob("rank*.json"):
            try:
                found.append(Incident(**json.loads(path.read_text())))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read and is passed over: %s", path, error)
        return sorted(found, key=lambda incident: incident.time)
