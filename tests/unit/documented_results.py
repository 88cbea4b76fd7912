"""Where results lie that the documentation shows, and how it writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MIB = 2**20

Cells = dict[str, list[str]]
"""Expected cells by those in the first column, which is left out."""


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def mib(number: float) -> str:
    return f"{number / MIB:.1f} MiB" if number else "0"


def spread(summary: dict[str, Any], digits: int, *, scale: float = 1.0, offset: float = 0.0) -> str:
    """Mean ± standard deviation over seeds of ``offset + scale * value``; of one seed, its value."""
    mean = f"{offset + scale * summary['mean']:.{digits}f}"
    return mean if summary["n"] == 1 else f"{mean} ± {abs(scale) * summary['sd']:.{digits}f}"


def variants(name: str) -> dict[str, dict[str, Any]]:
    """The variants of a comparison of one benchmark."""
    (benchmark,) = result(name)["benchmarks"]
    return {variant["name"]: variant for variant in benchmark["variants"]}
