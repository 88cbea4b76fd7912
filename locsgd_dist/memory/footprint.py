"""The number that decides about the batch, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FootprintSource = Literal["nvml", "cuda_allocator", "tensor_bytes", "host_rss"]


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one rank since the last reset, and what measured them."""

    bytes: int
    source: FootprintSource
