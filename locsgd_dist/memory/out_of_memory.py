"""Out of memory in the middle of a step.

A rank that fails there cannot tell its peers over the data group: they are inside a collective on it, and would wait
for one more that never comes. It leaves instead. It writes down which batch did not fit, and exits; torchrun stops its
peers, whatever they wait in, and starts all ranks anew; they go on from the newest checkpoint with the last batch that
worked. That is the same path that a killed process takes, on every backend, and it cannot deadlock.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch


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
        """Writes an incident down, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        path = self._folder / f"rank{rank}-{time.time_ns()}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"rank": rank, "per_gpu": per_gpu, "time": now}))
        os.replace(temporary, path)

    def read(self) -> list[Incident]:
        """All incidents so far, in the order in which they happened."""
        if not self._folder.is_dir():
            return []
        found = [Incident(**json.loads(path.read_text())) for path in self._folder.glob("rank*.json")]
        return sorted(found, key=lambda incident: incident.time)
