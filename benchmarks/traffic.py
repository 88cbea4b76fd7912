"""Bytes and time of what ranks exchange in a step: gradients of the SGD region, replicas of the localized one.

    python benchmarks/traffic.py --ranks 2 --output benchmarks/results/traffic.json
    python benchmarks/traffic.py --ranks 2 --link-mbps 200 --boundaries 0.75     # needs root: a shaped link

Real gloo ranks on this machine, the trainer's own step, ResNet-18 for CIFAR. Per boundary and replica mode, in turn
within one run: the step as it is, the step without replica traffic, the step without any exchange, and the collectives
alone. ``hidden`` is 1 - (step with - step without) / traffic alone. With ``--link-mbps`` each rank lives in a network
namespace of its own behind a link of that rate in each direction (tc), as ranks of a cluster do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import environment, ratio, spread, write_json
from rich.console import Console
from rich.table import Table
from shaped_link import run_ranks

from locsgd_dist.data import Batch
from locsgd_dist.distributed import Refresh, RegionDDP, ReplicaConfig, Replicas, Traffic, make_replicas
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner
from locsgd_dist.models import ModelConfig, build_model
from locsgd_dist.optimization import OptimConfig, RegionOptimizer
from locsgd_dist.step import Tally, TrainConfig, TrainStep

MODES = {
    "sharded": ReplicaConfig("sharded", 1),
    "sharded, every 8": ReplicaConfig("sharded", 8),
    "all_reduce": ReplicaConfig("all_reduce"),
    "periodic, every 8": ReplicaConfig("periodic", 8),
}
WINDOW = 8
"""Steps timed together: a whole window of the modes that exchange every eighth step."""


class DefaultBuckets(RegionDDP):
    """The region in the buckets that DDP takes by itself: one of 1 MiB, then of 25 MiB."""

    def _bucket_cap(self, region_bytes: int) -> None:
        return None


class Side:
    """The network of one rank, taking steps with the exchanges that it is given."""

    def __init__(
        self,
        options: argparse.Namespace,
        share: float,
        replicas: ReplicaConfig | None,
        *,
        reduces: bool,
        compression: str = "none",
        region: type[RegionDDP] = RegionDDP,
        refresh: type[Refresh] = Refresh,
        localized: LocalizedConfig | None = None,
        rule: str = "hebbian",
    ):
        torch.manual_seed(0)
        model = build_model(ModelConfig(name="resnet18", width=options.width), 10).train()
        model.to(memory_format=torch.channels_last)
        self.traffic = Traffic()
        group = dist.group.WORLD
        self.learner = LocalizedLearner(
            model, torch.zeros(1, 3, 32, 32), rule, lr=1e-3, batch_fraction=options.fraction
        )
        self.boundary = int(share * len(self.learner.layers))
        self.region = region(model, group if reduces else None, self.traffic, compression=compression)
        self.replicas = (
            make_replicas(replicas, self.learner, group, self.traffic)
            if replicas is not None
            else Replicas(self.learner)
        )
        # Without a configuration there are no refresh steps.
        refreshing = refresh(self.learner, group if reduces else None, self.traffic, localized or LocalizedConfig())
        optimizer = RegionOptimizer(model, OptimConfig(lr=1e-3), keeps_released=refreshing.enabled)
        optimizer.release(self.learner.advance(self.boundary))
        self.region.refresh()
        self.replicas.refresh()
        if replicas is None and options.sharded_work:
            # The side without replica traffic computes what the sharded side computes.
            owned = make_replicas(MODES["sharded"], self.learner, group, Traffic())
            owned.refresh()
        self.step = TrainStep(
            TrainConfig(device="cpu", channels_last=True),
            self.region,
            self.replicas,
            optimizer,
            refresh=refreshing,
            world_size=dist.get_world_size(),
            device=torch.device("cpu"),
        )
        images = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        targets = torch.arange(options.batch) % 10
        self.batch = Batch(images, targets, options.batch * dist.get_world_size(), options.batch)
        self.tally = Tally(torch.device("cpu"))
        self.sgd_region_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    def __call__(self) -> None:
        for _ in range(WINDOW):
            self.step([self.batch], self.tally)


def alone(payloads: list[int], broadcast: bool) -> Callable[[], None]:
    """A window's collectives with nothing beside them, one buffer per payload (bytes of float32)."""
    buffers = [torch.zeros(max(1, size // 4)) for size in payloads]

    def run() -> None:
        for index, buffer in enumerate(buffers):
            if broadcast:
                dist.broadcast(buffer, src=index % dist.get_world_size())
            else:
                dist.all_reduce(buffer)

    return run


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per step, the slowest rank's; every rank runs the same side at the same time."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name, side in sides.items():
            dist.barrier()
            start = time.perf_counter()
            side()
            taken = torch.tensor([(time.perf_counter() - start) / WINDOW], dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if index:  # the first round settles buckets and buffers
                seconds[name].append(taken.item())
    return seconds


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    for share in options.boundaries:
        for label, replicas in MODES.items():
            if options.modes and label not in options.modes:
                continue
            for compression in options.compression:
                options.sharded_work = replicas.mode == "sharded"
                whole = Side(options, share, replicas, reduces=True, compression=compression)
                no_replicas = Side(options, share, None, reduces=True, compression=compression)
                nothing = Side(options, share, None, reduces=False)
                whole()
                whole.replicas.synchronise()
                whole.traffic.take()
                whole()
                sent = whole.traffic.take()
                sides: dict[str, Callable[[], Any]] = {
                    "step": whole,
                    "without replicas": no_replicas,
                    "without exchange": nothing,
                }
                if options.default_buckets:
                    sides["default buckets"] = Side(
                        options, share, replicas, reduces=True, compression=compression, region=DefaultBuckets
                    )
                if sent.replica_bytes:
                    each = sent.replica_bytes // sent.replica_collectives
                    sides["replicas alone"] = alone([each] * sent.replica_collectives, replicas.mode == "sharded")
                if sent.gradient_bytes:
                    each = sent.gradient_bytes // sent.gradient_collectives
                    sides["gradients alone"] = alone([each] * sent.gradient_collectives, broadcast=False)
                seconds = in_turn(sides, options.rounds)
                record: dict[str, Any] = {
                    "share_of_layers": share,
                    "boundary": whole.boundary,
                    "replicas": label,
                    "compression": compression,
                    "gradient_bytes_per_step": sent.gradient_bytes / WINDOW,
                    "sgd_region_bytes": whole.sgd_region_bytes,
                    "replica_bytes_per_step": sent.replica_bytes / WINDOW,
                    "milliseconds": {name: 1e3 * spread(values)["median"] for name, values in seconds.items()},
                }
                if options.default_buckets:
                    record["step_in_default_buckets_over_step"] = ratio(seconds["default buckets"], seconds["step"])
                # Of medians: the differences of single rounds are smaller than their noise.
                middle = {name: spread(values)["median"] for name, values in seconds.items()}
                if "replicas alone" in middle:
                    extra = middle["step"] - middle["without replicas"]
                    record["replicas_hidden"] = 1 - extra / middle["replicas alone"]
                if "gradients alone" in middle:
                    extra = middle["without replicas"] - middle["without exchange"]
                    record["gradients_hidden"] = 1 - extra / middle["gradients alone"]
                    record["gradients_share_of_step"] = middle["gradients alone"] / middle["without replicas"]
                    record["step_over_no_exchange"] = ratio(seconds["step"], seconds["without exchange"])
                records.append(record)
                if dist.get_rank() == 0:
                    print(json.dumps(record), file=sys.stderr, flush=True)
    return records


def rank_main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    records = measure(options)
    if dist.get_rank() == 0:
        Path(options.result).write_text(json.dumps(records))
    dist.destroy_process_group()


def launch(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the ranks as processes of this file and returns what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        run_ranks([*sys.argv, "--result", str(result)], options.ranks, options.link_mbps)
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--boundaries", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=[])
    parser.add_argument("--compression", nargs="+", choices=["none", "bf16"], default=["none"])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images per rank and step")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the batch for localized updates")
    parser.add_argument("--default-buckets", action="store_true", help="also time the step in DDP's own buckets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link-mbps", type=float)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        rank_main(options)
        return
    records = launch(options)
    settings = {key: getattr(options, key) for key in ("ranks", "width", "batch", "rounds", "link_mbps", "fraction")}
    write_json(options.output, environment(torch.device("cpu")) | settings | {"steps": records})
    table = Table(title=f"{options.ranks} ranks, ResNet-18 at width {options.width}, {options.batch} images each")
    for column in (
        "boundary",
        "replicas",
        "bf16",
        "gradients",
        "replicas",
        "step ms",
        "no exchange",
        "hidden g",
        "hidden r",
    ):
        table.add_column(column)
    for record in records:
        table.add_row(
            f"{record['boundary']} ({record['share_of_layers']:.0%})",
            record["replicas"],
            "yes" if record["compression"] == "bf16" else "",
            f"{record['gradient_bytes_per_step'] / 2**20:.2f} MiB",
            f"{record['replica_bytes_per_step'] / 2**20:.2f} MiB",
            f"{record['milliseconds']['step']:.1f}",
            f"{record['milliseconds']['without exchange']:.1f}",
            f"{record['gradients_hidden']:.0%}" if "gradients_hidden" in record else "",
            f"{record['replicas_hidden']:.0%}" if "replicas_hidden" in record else "",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
