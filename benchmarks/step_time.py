"""Time of a training step: network x boundary x how the localized region learns, beside the limit of the arithmetic.

    python benchmarks/step_time.py --output benchmarks/results/step_time.json
    python benchmarks/step_time.py --networks resnet18 --boundaries 0.75 --rounds 9

Every contender takes the trainer's own step on the same batch, in turn within one run; ratios are taken round by
round. ``refresh/n`` is amortised: n-1 frozen steps and one refresh step. Limits count multiply-adds: forward 1,
backward 2 (1 in the first layer that has one: its input's gradient is never needed), a localized update 1 per layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import alternate, environment, ratio, spread, write_json
from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch

from locsgd_dist.data import Batch
from locsgd_dist.distributed import Refresh, RegionDDP, Replicas, Traffic
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner
from locsgd_dist.models import ModelConfig, build_model
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.step import Tally, TrainConfig, TrainStep


@dataclass(frozen=True)
class Network:
    name: str
    side: int
    batch: int
    classes: int


CPU_NETWORKS = {
    "resnet18": Network("resnet18", 32, 32, 10),
    "vgg13": Network("vgg13", 32, 32, 10),
    "resnet34": Network("torchvision:resnet34", 112, 8, 1000),
    "resnet50": Network("torchvision:resnet50", 112, 8, 1000),
    "mobilenet_v2": Network("torchvision:mobilenet_v2", 112, 16, 1000),
}
CUDA_NETWORKS = {
    "resnet18": Network("resnet18", 32, 512, 10),
    "vgg13": Network("vgg13", 32, 512, 10),
    "resnet34": Network("torchvision:resnet34", 224, 128, 1000),
    "resnet50": Network("torchvision:resnet50", 224, 128, 1000),
    "mobilenet_v2": Network("torchvision:mobilenet_v2", 224, 128, 1000),
}


@dataclass(frozen=True)
class Mode:
    """How the localized region learns in the step that is timed."""

    rule: str
    batch_fraction: float = 1.0
    refresh: bool = False
    recompute: bool = False
    refresh_fraction: float = 1.0


MODES = {
    "sgd": Mode("frozen"),
    "hebbian": Mode("hebbian"),
    "hebbian 1/8": Mode("hebbian", 1 / 8),
    "frozen": Mode("frozen"),
    "refresh step": Mode("frozen", refresh=True),
    "refresh step, recomputed": Mode("frozen", refresh=True, recompute=True),
    "refresh of 1/4 each step": Mode("frozen", refresh=True, refresh_fraction=1 / 4),
}


EAGER = "sgd, not compiled"


class Contender:
    """One network at one boundary, taking steps."""

    def __init__(self, network: Network, share: float, mode: Mode, train: TrainConfig, device: torch.device):
        torch.manual_seed(0)
        model = build_model(ModelConfig(name=network.name), network.classes).to(device).train()
        shape = (network.batch, 3, network.side, network.side)
        images = torch.randn(shape, device=device)
        if train.channels_last:
            model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        targets = torch.arange(network.batch, device=device) % network.classes
        self.learner = LocalizedLearner(model, images[:1], rule=mode.rule, lr=1e-3, batch_fraction=mode.batch_fraction)
        self.boundary = int(share * len(self.learner.layers))
        region = RegionDDP(model, None)
        replicas = Replicas(self.learner)
        config = LocalizedConfig(
            refresh_every=int(mode.refresh), refresh_recompute=mode.recompute, refresh_fraction=mode.refresh_fraction
        )
        refresh = Refresh(self.learner, None, Traffic(), config)
        optimizer = RegionOptimizer(model, OptimConfig(lr=1e-3), keeps_released=mode.refresh)
        optimizer.release(self.learner.advance(self.boundary))
        self.step = TrainStep(train, region, replicas, optimizer, refresh=refresh, world_size=1, device=device)
        if train.compile:
            model.compile()
        self.batch = Batch(images, targets, network.batch, network.batch)
        self.tally = Tally(device)

    def __call__(self) -> None:
        self.step([self.batch], self.tally)


def limits(learner: LocalizedLearner, boundary: int) -> dict[str, float]:
    """Multiply-adds of a step of plain SGD over those of each mode."""
    macs = [layer.macs for layer in learner.layers]
    forward, localized = sum(macs), sum(macs[:boundary])

    def backward(first: int) -> int:
        # Weight and input gradients of each layer, the first one's input gradient left out.
        return 2 * sum(macs[first:]) - (macs[first] if first < len(macs) else 0)

    sgd = forward + backward(0)
    step = {
        "sgd": sgd,
        "hebbian": forward + backward(boundary) + localized,
        "hebbian 1/8": forward + backward(boundary) + localized / 8,
        "frozen": forward + backward(boundary),
        "refresh step": sgd,
        "refresh step, recomputed": sgd + localized,
        "refresh of 1/4 each step": forward + backward(boundary) + (sgd - forward - backward(boundary)) / 4,
    }
    return {mode: sgd / cost for mode, cost in step.items()}


def measure(
    label: str,
    network: Network,
    shares: list[float],
    names: list[str],
    train: TrainConfig,
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    records = []
    for share in shares:
        modes = {name: MODES[name] for name in names if share > 0 or name == "sgd"}
        # Graphs are kept by code, of which all contenders share one: beyond its limit torch would go on uncompiled.
        torch._dynamo.reset()
        contenders: dict[str, Callable[[], Any]] = {}
        for name, mode in modes.items():
            contenders[name] = Contender(network, 0.0 if name == "sgd" else share, mode, train, device)
        if train.compile:
            contenders[EAGER] = Contender(network, 0.0, MODES["sgd"], replace(train, compile=False), device)
        probe: Any = contenders["frozen" if share > 0 else "sgd"]
        limit = limits(probe.learner, probe.boundary) | {EAGER: 1.0}
        taken = alternate(contenders, device, rounds=rounds, warmup=2)
        if share > 0:
            for every in (4, 8):
                for suffix in (s for s in ("", ", recomputed") if f"refresh step{s}" in names):
                    name = f"refresh/{every}{suffix}"
                    for seconds in (taken.wall, taken.cpu):
                        refreshed = seconds[f"refresh step{suffix}"]
                        seconds[name] = [
                            ((every - 1) * frozen + refresh) / every
                            for frozen, refresh in zip(seconds["frozen"], refreshed, strict=True)
                        ]
                    frozen_cost, refresh_cost = 1 / limit["frozen"], 1 / limit[f"refresh step{suffix}"]
                    limit[name] = every / ((every - 1) * frozen_cost + refresh_cost)
        for name in taken.wall:
            record = {
                "network": label,
                "side": network.side,
                "batch": network.batch,
                "share_of_layers": share,
                "boundary": 0 if name in ("sgd", EAGER) else probe.boundary,
                "mode": name,
                "milliseconds": 1e3 * spread(taken.wall[name])["median"],
                "cpu_milliseconds": 1e3 * spread(taken.cpu[name])["median"],
                "limit": limit[name],
            }
            for clock, seconds in {"": taken.wall, "cpu_": taken.cpu}.items():
                record[f"{clock}speed_up_over_sgd"] = ratio(seconds["sgd"], seconds[name])
                if share > 0:
                    record[f"{clock}time_over_frozen"] = ratio(seconds[name], seconds["frozen"])
            records.append(record)
    return records


def parts(contenders: dict[str, Contender], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of forward, localized update, backward, optimizer and the rest of a step of each contender.

    The contenders take turns; medians over rounds.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name, contender in contenders.items():
            watch = Stopwatch(device)
            watch.watch_step(contender.step, contender.learner)
            try:
                watch.around("rest", contender)()
            finally:
                watch.release()
            for part, seconds in watch.seconds.items():
                found[name].setdefault(part, []).append(1e3 * seconds)
    return {name: {part: spread(values)["median"] for part, values in of.items()} for name, of in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CPU_NETWORKS), default=list(CPU_NETWORKS))
    parser.add_argument("--boundaries", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="sgd and frozen always")
    parser.add_argument("--batch", type=int, help="images in a step; default: each network's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-parts", action="store_true", help="leave out the split into forward, update, backward")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.batch is not None and options.batch < 8:
        parser.error(f"--batch must be >= 8, of which an eighth is an image, got {options.batch}")
    torch.set_num_threads(options.threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = torch.device(options.device)
    train = TrainConfig(device=options.device, precision=options.precision, channels_last=True, compile=options.compile)
    networks = CUDA_NETWORKS if device.type == "cuda" else CPU_NETWORKS
    result = environment(device) | {"rounds": options.rounds, "steps": [], "parts": []}
    for label in options.networks:
        network = networks[label]
        if options.batch:
            network = replace(network, batch=options.batch)
        names = [name for name in MODES if name in {*options.modes, "sgd", "frozen"}]
        records = measure(label, network, options.boundaries, names, train, device, options.rounds)
        result["steps"] += records
        show(label, records)
        if not options.no_parts:
            contenders = {
                name: Contender(network, 0.0 if name == "sgd" else 0.75, MODES[name], train, device) for name in names
            }
            for name, split in parts(contenders, device, max(3, options.rounds // 3)).items():
                result["parts"].append({"network": label, "share_of_layers": 0.75, "mode": name, "milliseconds": split})
        write_json(options.output, result)


def show(label: str, records: list[dict[str, Any]]) -> None:
    table = Table(title=label)
    # On the CPU, time spent on a core: other work on the machine stretches the wall-clock of single steps at random.
    clock = "" if torch.cuda.is_initialized() else "cpu_"
    for column in ("boundary", "mode", "ms", f"{clock}ms", "SGD / mode", "limit", "mode / frozen"):
        table.add_column(column)
    for record in records:
        over_frozen = record.get(f"{clock}time_over_frozen")
        table.add_row(
            f"{record['boundary']} ({record['share_of_layers']:.0%})",
            record["mode"],
            f"{record['milliseconds']:.1f}",
            f"{record[f'{clock}milliseconds']:.1f}",
            "{median:.2f} ({min:.2f}-{max:.2f})".format(**record[f"{clock}speed_up_over_sgd"]),
            f"{record['limit']:.2f}",
            "{median:.2f} ({min:.2f}-{max:.2f})".format(**over_frozen) if over_frozen else "",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
