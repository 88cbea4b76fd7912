"""What skipping half of a network's residual blocks saves: step time and exact tensor bytes, in turn with full steps.

python benchmarks/stochastic_depth.py --json benchmarks/results/stochastic_depth.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from locsgd_dist.baselines.stochastic_depth import (
    StochasticDepthConfig,
    droppable_blocks,
    with_droppable_blocks,
)
from locsgd_dist.memory import FootprintMonitor, MonitorConfig
from locsgd_dist.models import ModelConfig, build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=int, help="of the CIFAR networks")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=20, help="full steps and steps with half the blocks, in turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = build_model(ModelConfig(name=options.model, width=options.width), 10)
    model = with_droppable_blocks(model, StochasticDepthConfig(0.5)).to(device)
    blocks = droppable_blocks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device)
    targets = torch.randint(10, (options.batch,), device=device)

    def step(skip_half: bool) -> float:
        for index, block in enumerate(blocks):
            block.dropped = skip_half and index % 2 == 1
        synchronise(device)
        start = time.perf_counter()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        return time.perf_counter() - start

    def footprint(skip_half: bool) -> int:
        with FootprintMonitor(MonitorConfig(trace_hz=0, nvml=False), device) as monitor:
            monitor.reset_peak()
            with monitor.measured_step(model, optimizer):
                step(skip_half)
            return monitor.footprint().bytes

    for _ in range(2):  # momentum, and the choice of kernels
        step(False)
        step(True)
    pairs = [(step(False), step(True)) for _ in range(options.pairs)]
    ratios = [half / full for full, half in pairs]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": f"{name}, {options.threads} thread(s), torch {torch.__version__}",
        "blocks": len(blocks),
        "blocks_skipped": len(blocks) // 2,
        "full_step_seconds": statistics.median(full for full, _ in pairs),
        "half_step_seconds": statistics.median(half for _, half in pairs),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "full_footprint_bytes": footprint(False),
        "half_footprint_bytes": footprint(True),
        "pairs": options.pairs,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
