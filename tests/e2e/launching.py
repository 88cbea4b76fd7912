"""How the end-to-end tests start the trainer and read what it left."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Launch = Callable[..., subprocess.CompletedProcess[str]]


# What a user has to export who starts torchrun by hand (launch/README.md); the project's own launch paths do.
REMEDY = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def environment() -> dict[str, str]:
    """A user's environment, with this folder importable (for data and model factories) and one thread per rank.

    Without the remedy for restarts: what a test launches by one of the project's paths gets it from there.
    """
    inherited = {key: value for key, value in os.environ.items() if key != REMEDY}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if kind is None or event["type"] == kind]
