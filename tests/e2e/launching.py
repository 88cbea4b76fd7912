"""How the end-to-end tests start the trainer and read what it left."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Launch = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """A user's environment, with this folder importable (for data and model factories) and one thread per rank."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if kind is None or event["type"] == kind]
