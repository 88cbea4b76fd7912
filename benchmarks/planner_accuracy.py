"""Foretold against measured: the planner's footprint beside the exact tensor bytes of real steps on the CPU.

    python benchmarks/planner_accuracy.py [--batch 8] [--output benchmarks/results/planner_accuracy.json]

The paper's five networks at their full width and input size (32 for CIFAR, 224 for ImageNet), three boundaries each,
trained with SGD and momentum by the trainer's own step; no data set is needed. Also how long a plan of ResNet-50 over
all of its boundaries takes. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from locsgd_dist.config import Config, parse_config
from locsgd_dist.data import Batch, DataShape
from locsgd_dist.distributed import RegionDDP, Replicas
from locsgd_dist.formatting import format_bytes
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.memory import FootprintMonitor, MonitorConfig
from locsgd_dist.models import build_model
from locsgd_dist.optimization import RegionOptimizer
from locsgd_dist.planner import Machine, Planner, StepEstimator, planned_data
from locsgd_dist.step import Tally, TrainStep

CPU = torch.device("cpu")
NETWORKS = {
    "cifar10/resnet18": (10, 32, (0, 10, 15)),
    "cifar10/vgg13": (10, 32, (0, 5, 8)),
    "imagenet/resnet34": (1000, 224, (0, 18, 27)),
    "imagenet/resnet50": (1000, 224, (0, 15, 40)),
    "imagenet/mobilenet_v2": (1000, 224, (0, 20, 39)),
}
"""Configuration → classes, side of the input, boundaries: the first, about a third or half, L_max."""


def measured(config: Config, classes: int, side: int, boundaries: tuple[int, ...], batch_size: int) -> list[int]:
    """Exact tensor bytes of the second step at each boundary."""
    model = build_model(config.model, classes).train()
    learner = LocalizedLearner(model, torch.zeros(1, 3, side, side), rule=config.localized.rule)
    optimizer = RegionOptimizer(model, config.optim)
    step = TrainStep(config.train, RegionDDP(model, None), Replicas(learner), optimizer, world_size=1, device=CPU)
    batch = Batch(torch.randn(batch_size, 3, side, side), torch.arange(batch_size) % classes, batch_size, batch_size)
    found = []
    for boundary in boundaries:
        optimizer.release(learner.advance(boundary))
        step([batch], Tally(CPU))
        with FootprintMonitor(MonitorConfig(trace_hz=0), CPU) as monitor:
            with monitor.measured_step(model, optimizer.optimizer):
                step([batch], Tally(CPU))
            found.append(monitor.footprint().bytes)
    return found


def compare(name: str, batch_size: int) -> list[dict[str, Any]]:
    """One record per boundary of the network."""
    classes, side, boundaries = NETWORKS[name]
    config = parse_config(["--config", name, f"--batch.per_gpu={batch_size}"])
    estimator = StepEstimator(config, DataShape(classes, side), world_size=1, rounding=1)
    planned = [estimator.move_to(boundary).memory.at(batch_size).total for boundary in boundaries]
    return [
        {
            "network": name,
            "image_size": side,
            "batch": batch_size,
            "boundary": boundary,
            "planned_bytes": plan,
            "measured_bytes": real,
            "relative_error": plan / real - 1,
        }
        for boundary, plan, real in zip(
            boundaries, planned, measured(config, classes, side, boundaries, batch_size), strict=True
        )
    ]


def seconds_of_a_plan() -> dict[str, float]:
    """A plan of ResNet-50 over all boundaries, by the clock and in processor time."""
    config = parse_config(["--config", "imagenet/resnet50"])
    wall, processor = time.perf_counter(), time.process_time()
    plan = Planner(config, planned_data(config.data), Machine(gpus=4, memory_bytes=10 << 30)).to_json()
    return {
        "boundaries": len(plan["boundaries"]),
        "wall_seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "planner_accuracy.json")
    options = parser.parse_args()
    records = [record for name in NETWORKS for record in compare(name, options.batch)]
    table = Table("network", "boundary", "planned", "measured", "error")
    for record in records:
        table.add_row(
            *(record["network"], str(record["boundary"])),
            *(format_bytes(record["planned_bytes"]), format_bytes(record["measured_bytes"])),
            f"{100 * record['relative_error']:+.3f} %",
        )
    duration = seconds_of_a_plan()
    Console().print(table, f"ResNet-50, all boundaries: {duration}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python benchmarks/planner_accuracy.py --batch {options.batch}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "resnet50_plan": duration,
        "records": records,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
