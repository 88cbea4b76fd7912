"""The memory monitor's CSV read back: one curve of peaks per rank, at a cost that a long run does not raise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SOURCES = {
    "nvml_process_used": "NVML, this process",
    "nvml_device_used": "NVML, whole device",
    "cuda_reserved": "CUDA allocator, reserved",
    "cuda_allocated": "CUDA allocator, allocated",
    "tensor_peak": "Tensors of a training step",
    "host_rss": "Host, resident set",
}
"""Columns of bytes in the order of trust, as the footprint monitor has it, and what a report calls them."""

MAX_BYTES = 2 * 2**20
"""What is read of a file; of a longer one, as much in evenly spread blocks."""
NUM_BLOCKS = 512
NUM_BUCKETS = 256
"""Points of a curve; at most half of `NUM_BLOCKS`, so that each has a whole block to take its peak from."""
PAUSE = 60.0
"""Seconds without a sample (a run stopped and resumed) that interrupt a curve, and at least 4 of its buckets."""


@dataclass(frozen=True)
class RankTrace:
    """Memory of one rank over time."""

    rank: int
    source: str
    """Key of `SOURCES`: the column that the values come from."""
    times: Array
    """[P] unix seconds, ascending."""
    values: Array
    """[P] bytes, each the peak of a stretch of time; NaN where the trace pauses."""


def load_memory_traces(path: Path) -> list[RankTrace]:
    """The traces of all ranks that wrote to the file `path`; empty if there are none."""
    table = _read(path)
    ranks, times, values = np.nan_to_num(table[:, 0]), table[:, 1], table[:, 2:]
    recorded = np.isfinite(values).any(axis=0)
    if not recorded.any():
        return []
    column = int(recorded.argmax())  # one source for all ranks, so that their curves can be compared
    traces = []
    for rank in np.unique(ranks):
        rows = (ranks == rank) & np.isfinite(values[:, column])
        if rows.any():
            points = _peaks(times[rows], values[rows, column])
            traces.append(RankTrace(int(rank), tuple(SOURCES)[column], *points))
    return traces


def _peaks(times: Array, values: Array) -> tuple[Array, Array]:
    """At most `NUM_BUCKETS` points (and a NaN for each pause): the highest value of each stretch of time."""
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    width = max(times[-1] - times[0], 1e-9) / NUM_BUCKETS
    buckets = np.minimum((times - times[0]) // width, NUM_BUCKETS - 1)
    starts = np.flatnonzero(np.diff(buckets, prepend=-1.0))
    times, values = times[starts], np.maximum.reduceat(values, starts)
    pauses = np.flatnonzero(np.diff(times) > max(PAUSE, 4 * width)) + 1
    return np.insert(times, pauses, times[pauses]), np.insert(values, pauses, math.nan)


def _read(path: Path) -> Array:
    """[N, 2 + len(SOURCES)]: rank, time, then the columns of `SOURCES`; NaN for an empty cell."""
    names = ("rank", "time", *SOURCES)
    if not path.exists():
        return np.empty((0, len(names)))
    with path.open("rb") as file:
        header = file.readline().decode("utf-8", "replace").strip().split(",")
    if "time" not in header:
        return np.empty((0, len(names)))
    present = [place for place, name in enumerate(names) if name in header]
    columns = [header.index(names[place]) for place in present]
    rows = []
    for line in _lines(path):
        cells = line.split(b",")
        if len(cells) == len(header):  # a torn line is shorter
            with suppress(ValueError):  # a header that a resumed run wrote again
                rows.append([float(cells[column] or b"nan") for column in columns])
    table = np.full((len(rows), len(names)), np.nan)
    if rows:
        table[:, present] = rows
    return table[np.isfinite(table[:, 1])]


def _lines(path: Path) -> Iterator[bytes]:
    """All whole lines of a small file; of a large one, those of `NUM_BLOCKS` blocks."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= MAX_BYTES:
            yield from file.read().splitlines()
            return
        length = MAX_BYTES // NUM_BLOCKS
        for block in range(NUM_BLOCKS):
            file.seek(block * (size - length) // (NUM_BLOCKS - 1))
            yield from file.read(length).splitlines()[1:-1]
