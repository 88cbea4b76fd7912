"""How gradients are cut into all-reduce buckets."""

from __future__ import annotations

from collections.abc import Sequence

_MIB = 1 << 20
REFRESH_BUCKET_BYTES = 25 * _MIB
"""Of the localized region's gradients, which leave together: no backward pass is left to fill later buckets in."""


def bucket_mib(region_bytes: int) -> int:
    """Size of all-reduce buckets that a region with gradients of ``region_bytes`` takes by itself, in MiB.

    A bucket travels while the backward pass fills the next ones; the last has nothing left to hide behind. DDP's own
    are one of 1 MiB and then of 25 MiB, more than a small region has in all: what the first leaves would travel in one
    piece, behind the backward pass. About an eighth leaves as much of the exchange at the end; below 1 MiB messages get
    too small. Rounded down to whole MiB.
    """
    return min(25, max(1, region_bytes // (8 * _MIB)))


def cut(sizes: Sequence[int], capacity: int) -> list[slice]:
    """Cuts tensors of these sizes, in order, into buckets, each closed by the tensor that fills it: as DDP does."""
    ends, filled = [], 0
    for end, size in enumerate(sizes, start=1):
        filled += size
        if filled >= capacity or end == len(sizes):
            ends.append(end)
            filled = 0
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
