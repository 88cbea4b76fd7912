"""Memory of a training step: what autograd keeps for the backward pass, and the peak of a whole step.

    python benchmarks/memory.py --output benchmarks/results/memory.json

The five networks at full width and input size, the trainer's own step on real tensors; bytes are exact and do not
depend on the machine. Beside the share of activations that a boundary frees stands the share of the layers' inputs
alone, which is what arithmetic on layer shapes foretells: norms and activations keep tensors too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import environment, write_json
from rich.console import Console
from rich.table import Table
from step_time import MODES, Contender, Mode, Network

from locsgd_dist.formatting import format_bytes
from locsgd_dist.memory import FootprintMonitor, MonitorConfig
from locsgd_dist.memory.tensor_bytes import saved_activation_bytes
from locsgd_dist.step import TrainConfig

CPU = torch.device("cpu")
NETWORKS = {
    "resnet18": Network("resnet18", 32, 32, 10),
    "vgg13": Network("vgg13", 32, 32, 10),
    "resnet34": Network("torchvision:resnet34", 224, 8, 1000),
    "resnet50": Network("torchvision:resnet50", 224, 8, 1000),
    "mobilenet_v2": Network("torchvision:mobilenet_v2", 224, 8, 1000),
}


def peak_bytes(contender: Contender) -> int:
    """Exact tensor bytes of a step, weights and optimizer state included."""
    contender()  # momentum and gradients exist from here on
    with FootprintMonitor(MonitorConfig(trace_hz=0), CPU) as monitor:
        with monitor.measured_step(contender.step.model, contender.step.optimizer):
            contender()
        return monitor.footprint().bytes


def kept_bytes(contender: Contender) -> int:
    """Bytes that autograd keeps between the forward and the backward pass."""
    model, batch = contender.step.model, contender.batch
    return saved_activation_bytes(
        lambda: F.cross_entropy(model(batch.images), batch.targets), [*model.parameters(), *model.buffers()]
    )


def layer_input_bytes(contender: Contender) -> list[int]:
    """Bytes of each layer's input, in execution order."""
    found: dict[int, int] = {}

    def note(index: int, a: torch.Tensor) -> None:
        found[index] = a.numel() * a.element_size()

    handles = [
        layer.module.register_forward_pre_hook(lambda _, args, index=layer.index: note(index, args[0]))
        for layer in contender.learner.layers
    ]
    with torch.no_grad():
        contender.step.model(contender.batch.images)
    for handle in handles:
        handle.remove()
    return [found[index] for index in sorted(found)]


def measure(label: str, network: Network, shares: list[float], modes: dict[str, Mode]) -> list[dict[str, Any]]:
    train = TrainConfig(device="cpu", channels_last=True)
    sgd = Contender(network, 0.0, MODES["sgd"], train, CPU)
    inputs = layer_input_bytes(sgd)
    whole, kept_by_sgd = peak_bytes(sgd), kept_bytes(sgd)
    common = {"network": label, "side": network.side, "batch": network.batch}
    records: list[dict[str, Any]] = [
        common | {"mode": "sgd", "boundary": 0, "peak_bytes": whole, "kept_bytes": kept_by_sgd}
    ]
    for share in shares:
        for name, mode in modes.items():
            contender = Contender(network, share, mode, train, CPU)
            record = common | {
                "mode": name,
                "share_of_layers": share,
                "boundary": contender.boundary,
                "peak_bytes": peak_bytes(contender),
            }
            record["peak_over_sgd"] = record["peak_bytes"] / whole
            if name == "frozen":
                record["kept_bytes"] = kept_bytes(contender)
                record["share_of_activations_freed"] = 1 - record["kept_bytes"] / kept_by_sgd
                record["share_of_layer_inputs_freed"] = sum(inputs[: contender.boundary]) / sum(inputs)
            records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--boundaries", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    modes = {name: mode for name, mode in MODES.items() if name not in ("sgd", "hebbian")}
    result = environment(CPU) | {"steps": []}
    table = Table("network", "boundary", "mode", "peak of a step", "of SGD's", "activations freed", "layer inputs")
    for label in options.networks:
        records = measure(label, NETWORKS[label], options.boundaries, modes)
        result["steps"] += records
        write_json(options.output, result)
        for record in records:
            table.add_row(
                label,
                str(record["boundary"]),
                record["mode"],
                format_bytes(record["peak_bytes"]),
                f"{record.get('peak_over_sgd', 1.0):.2f}",
                f"{record['share_of_activations_freed']:.2f}" if "share_of_activations_freed" in record else "",
                f"{record['share_of_layer_inputs_freed']:.2f}" if "share_of_layer_inputs_freed" in record else "",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
