"""Where the time of a step goes: a table of operators from torch.profiler, for docs/performance.md.

python benchmarks/profile_step.py --networks resnet18 resnet50 --mode "hebbian 1/8" --share 0.75
python benchmarks/profile_step.py --trace step.json     # a Chrome trace, for a flame graph
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from measuring import environment, write_json
from rich.console import Console
from rich.table import Table
from step_time import CPU_NETWORKS, CUDA_NETWORKS, MODES, Contender
from torch.profiler import ProfilerActivity, profile

from locsgd_dist.step import TrainConfig


def shares_by_operator(contender: Contender, steps: int, device: torch.device, trace: Path | None) -> dict[str, float]:
    """Share of the step's time that each operator takes itself, children left out."""
    contender()
    contender()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            contender()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[event.key] += own
    total = sum(seconds.values())
    return {name: own / total for name, own in sorted(seconds.items(), key=lambda pair: -pair[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"], choices=list(CPU_NETWORKS))
    parser.add_argument("--mode", nargs="+", default=["sgd", "frozen", "hebbian", "hebbian 1/8"], choices=list(MODES))
    parser.add_argument("--share", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--trace", type=Path, help="also write a Chrome trace of the last profile")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    train = TrainConfig(device=options.device, channels_last=True)
    result: dict[str, Any] = environment(device) | {"profiles": []}
    for label in options.networks:
        network = (CUDA_NETWORKS if device.type == "cuda" else CPU_NETWORKS)[label]
        profiles = {}
        for mode in options.mode:
            contender = Contender(network, 0.0 if mode == "sgd" else options.share, MODES[mode], train, device)
            profiles[mode] = shares_by_operator(contender, options.steps, device, options.trace)
            result["profiles"].append(
                {"network": label, "mode": mode, "shares": dict(list(profiles[mode].items())[: options.top])}
            )
        show(label, profiles, options.top)
    write_json(options.output, result)


def show(label: str, profiles: dict[str, dict[str, float]], top: int) -> None:
    table = Table("operator", *profiles, title=f"{label}: share of the step's time")
    names = dict.fromkeys(name for shares in profiles.values() for name in list(shares)[:top])
    for name in names:
        table.add_row(name, *(f"{shares.get(name, 0):.1%}" for shares in profiles.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
