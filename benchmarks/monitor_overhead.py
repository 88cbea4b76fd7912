"""What watching memory costs: step time with and without the background trace, alternating in one run.

python benchmarks/monitor_overhead.py --json benchmarks/results/monitor_overhead.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from locsgd_dist.memory import FootprintMonitor, MonitorConfig
from locsgd_dist.models import ModelConfig, build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="blocks with and without, in turn")
    parser.add_argument("--steps", type=int, default=10, help="training steps in a block")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet18", width=options.width), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))

    def step() -> None:
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def block(monitor: FootprintMonitor | None, measured: bool = False) -> float:
        start = time.perf_counter()
        for _ in range(options.steps):
            if monitor is not None and measured:
                with monitor.measured_step(model, optimizer):
                    step()
            else:
                step()
        return (time.perf_counter() - start) / options.steps

    block(None)
    traced, measured = [], []
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.pairs):
            plain = block(None)
            with FootprintMonitor(MonitorConfig(trace_hz=10), torch.device("cpu")) as monitor:
                monitor.start_trace(Path(folder) / f"{index}.csv", rank=0)
                with_trace = block(monitor)
            with FootprintMonitor(MonitorConfig(trace_hz=0), torch.device("cpu")) as monitor:
                with_measure = block(monitor, measured=True)
            seconds.append(plain)
            traced.append(with_trace / plain)
            measured.append(with_measure / plain)
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}",
        "step_seconds_median": statistics.median(seconds),
        "ratio_with_trace_10hz": {
            "median": statistics.median(traced),
            "min": min(traced),
            "max": max(traced),
        },
        "ratio_measured_step": {
            "median": statistics.median(measured),
            "min": min(measured),
            "max": max(measured),
            "note": "a measured step is one step per epoch",
        },
        "pairs": options.pairs,
        "steps": options.steps,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
