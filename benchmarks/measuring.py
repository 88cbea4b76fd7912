"""What the benchmarks share: contenders timed in turn within one run, their medians, the JSON they leave."""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Taken:
    """Seconds of each contender in each round.

    Attributes:
        wall: what a clock on the wall shows.
        cpu: what this process's threads spent on cores: on a shared machine the steadier figure, for work on the CPU.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock of one call, all of its work on the device included."""
    return _timed(call, device)[0]


def alternate(
    contenders: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int, warmup: int = 1
) -> Taken:
    """Times every contender in each round. A round runs all of them once, in an order drawn anew, so that what else
    the machine does meets every contender alike; compare within rounds (see :func:`ratio`)."""
    for call in contenders.values():
        for _ in range(warmup):
            seconds_of(call, device)
    order = list(contenders)
    draw = random.Random(0)
    taken = Taken({name: [] for name in order}, {name: [] for name in order})
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            wall, cpu = _timed(contenders[name], device)
            taken.wall[name].append(wall)
            taken.cpu[name].append(cpu)
    return taken


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median, least and most of the round-by-round ratio."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def command_line() -> str:
    """The command that takes the figures."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def environment(device: torch.device) -> dict[str, Any]:
    """Where a figure was taken, without naming the machine."""
    return {
        "command": command_line(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
