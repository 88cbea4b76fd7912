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
