"""What the benchmarks share: contenders timed in turn within one run, their medians, the JSON they leave."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock of one call, all of its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(
    contenders: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender in each round. A round runs all of them once, in an order drawn anew, so that what
    else the machine does meets every contender alike; compare within rounds (see :func:`ratio`)."""
    for call in contenders.values():
        for _ in range(warmup):
            seconds_of(call, device)
    order = list(contenders)
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(contenders[name], device))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median, least and most of the round-by-round ratio."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def environment(device: torch.device) -> dict[str, Any]:
    """Where a figure was taken, without naming the machine."""
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
