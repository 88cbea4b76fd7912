"""The plan of a run: memory, batch, traffic and time at every boundary and in every epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from locsgd_dist.config import Config
from locsgd_dist.localized import LayerMap
from locsgd_dist.localized.selection import largest_boundary
from locsgd_dist.memory import BatchConfig
from locsgd_dist.planner.costs import EpochTraffic, Machine, epoch_time, epoch_traffic, num_steps
from locsgd_dist.planner.footprint import BoundaryStep, StepEstimator
from locsgd_dist.planner.inputs import PlannedData
from locsgd_dist.planner.schedule import (
    Pace,
    PlannedEpoch,
    boundaries_per_epoch,
    interval_epochs,
    planned_epochs,
)

Policy = Literal["fixed", "halving", "fit"]

NOT_ESTIMATED = (
    "the CUDA context (300 to 600 MB), NCCL's buffers and cuDNN's and cuBLAS's workspaces",
    "fragmentation, and blocks that the CUDA allocator keeps cached",
    "images that wait in the input pipeline or are held on the device (data.in_memory)",
)
"""Memory that the planner leaves out."""


@dataclass(frozen=True)
class ScalingPoint:
    """The whole run on a number of GPUs, the per-GPU batch at its start the same on each.

    Attributes:
        seconds: training time of the run; plain_seconds: of plain DDP at the fixed batch.
        efficiency: how much of n times one GPU's speed n GPUs reach, each kind of training by itself.
    """

    gpus: int
    global_batch: int
    seconds: float
    plain_seconds: float
    efficiency: float
    plain_efficiency: float

    @property
    def speed_up(self) -> float:
        """Over plain DDP on as many GPUs."""
        return self.plain_seconds / self.seconds


class Planner:
    """Foretells a run.

    Args:
        config: the run.
        data: its input and the length of its epochs.
        machine: what it is to run on.
        pace, trace: see :func:`boundaries_per_epoch`.
        policy: in the place of ``batch.policy``; by default the configured one, or the paper's halving where the
            configured one is ``fixed``.

    Raises:
        ValueError: the network is unknown or cannot be foretold, or the trace does not fit it.
    """

    def __init__(
        self,
        config: Config,
        data: PlannedData,
        machine: Machine,
        *,
        pace: Pace | None = None,
        trace: Path | None = None,
        policy: Policy | None = None,
    ):
        self.config, self.data, self.machine = config, data, machine
        self.batch: BatchConfig = replace(
            config.batch,
            policy=policy or ("halving" if config.batch.policy == "fixed" else config.batch.policy),
        )
        estimator = StepEstimator(config, data.shape, world_size=machine.gpus)
        self.layers: LayerMap = estimator.layers
        self.boundaries = boundaries_per_epoch(config, self.layers, pace, trace)
        self.pace = "replay" if trace is not None else pace or config.selection.kind
        limit = 0 if config.localized.rule == "none" else largest_boundary(config.selection.lmax, len(self.layers))
        self.steps: list[BoundaryStep] = [
            estimator.move_to(boundary) for boundary in range(max(limit, *self.boundaries) + 1)
        ]
        self.footprint = lru_cache(maxsize=None)(self._footprint)
        self.epochs = self.epochs_on(machine)

    @property
    def batches_per_step(self) -> int:
        """Per-GPU batches in one optimizer step."""
        return self.machine.gpus * self.config.train.gradient_accumulation

    @property
    def can_time(self) -> bool:
        """Whether enough is known of the machine to foretell times."""
        return self.machine.flops_per_second is not None and (
            self.machine.gpus == 1 or self.machine.bytes_per_second is not None
        )

    def epochs_on(self, machine: Machine) -> list[PlannedEpoch]:
        """Boundary and batch of each epoch on ``machine``; footprints are those of the planned one."""
        return planned_epochs(
            self.boundaries,
            self.footprint,
            self.batch,
            interval=interval_epochs(self.config, self.layers),
            num_train=self.data.num_train,
            batches_per_step=machine.gpus * self.config.train.gradient_accumulation,
            memory_bytes=machine.memory_bytes,
        )

    def traffic(self, boundary: int, per_gpu: int, machine: Machine | None = None) -> EpochTraffic:
        """What a rank exchanges in an epoch."""
        gpus = (machine or self.machine).gpus
        steps = num_steps(self.data.num_train, per_gpu * gpus * self.config.train.gradient_accumulation)
        config = self.config
        return epoch_traffic(
            self.steps[boundary], steps, gpus, config.replicas, config.localized, config.distributed.bucket_mib
        )

    def seconds(self, boundary: int, per_gpu: int, machine: Machine | None = None) -> float:
        """Training time of an epoch."""
        machine = machine or self.machine
        traffic = self.traffic(boundary, per_gpu, machine)
        return epoch_time(
            self.steps[boundary],
            traffic,
            num_train=self.data.num_train,
            machine=machine,
            replicas=self.config.replicas,
            localized=self.config.localized,
        ).total

    def plain_bytes(self) -> int:
        """What plain DDP exchanges in an epoch: all gradients, uncompressed, at the starting batch."""
        if self.machine.gpus == 1:
            return 0
        gradient_bytes = sum(p.numel() * p.element_size() for p in self.layers.parameters().values())
        return gradient_bytes * num_steps(self.data.num_train, self.config.batch.per_gpu * self.batches_per_step)

    def scaling(self) -> list[ScalingPoint]:
        """The run on 1, 2, 4 ... GPUs, and on as many as planned."""
        counts = sorted({2**k for k in range(int(math.log2(self.machine.gpus)) + 1)} | {self.machine.gpus})
        times: list[tuple[float, float]] = []
        per_gpu = self.config.batch.per_gpu
        for gpus in counts:
            machine = replace(self.machine, gpus=gpus)
            planned = {(e.boundary, e.per_gpu): 0 for e in self.epochs_on(machine)}
            for e in self.epochs_on(machine):
                planned[e.boundary, e.per_gpu] += 1
            seconds = sum(count * self.seconds(*key, machine) for key, count in planned.items())
            times.append((seconds, len(self.boundaries) * self.seconds(0, per_gpu, machine)))
        return [
            ScalingPoint(
                gpus,
                gpus * per_gpu * self.config.train.gradient_accumulation,
                *(seconds, plain),
                efficiency=times[0][0] / (gpus * seconds),
                plain_efficiency=times[0][1] / (gpus * plain),
            )
            for gpus, (seconds, plain) in zip(counts, times, strict=True)
        ]

    def assumptions(self) -> list[str]:
        """What the numbers rest on, a sentence each."""
        config, machine = self.config, self.machine
        found = [self.data.assumption] if self.data.assumption else []
        found.append(
            "Boundaries: "
            + {
                "dynamic": "a shift at every chance, which is the fastest that algorithm 1 can be.",
                "static": "the quadratic schedule of the epoch.",
                "linear": "the linear schedule of the epoch.",
                "fixed": "as configured.",
                "replay": "the recorded trace.",
            }[self.pace]
        )
        if config.batch.policy != self.batch.policy:
            found.append(
                f"The batch grows by batch.policy={self.batch.policy}; the configuration says {config.batch.policy}."
            )
        if config.train.compile:
            found.append("Memory of the uncompiled network: what torch.compile fuses is not kept.")
        if config.localized.keep_outputs:
            found.append("Memory and time of epochs whose images come for the first time: no outputs are kept yet.")
        if machine.gpus > 1:
            found.append(
                "Memory of one rank under DDP, whose buckets live throughout, in a step that exchanges replicas."
            )
        if self.can_time:
            found += [
                "Time: two operations per multiply-add of convolutions and linear maps at the given rate; "
                "normalisations, activations, the optimizer, input and evaluation cost nothing.",
                "Collectives run on a ring beside the backward pass and show only where they take longer.",
                "Scaling: as many images per GPU and the same memory on any number of GPUs.",
            ]
            if any(layer.macs == 0 for layer in self.layers):
                found.append("Attention and other opaque layers are left out of the time: their products are unknown.")
        return found

    def to_json(self) -> dict[str, Any]:
        """The plan as one object of plain values; bytes, seconds, images."""
        config, machine = self.config, self.machine
        return {
            "model": config.model.name,
            "num_parameters": sum(p.numel() for p in self.layers.parameters().values()),
            "num_layers": len(self.layers),
            "block_size": self.layers.block_size,
            "image_size": self.data.shape.image_size,
            "num_classes": self.data.shape.num_classes,
            "num_train": self.data.num_train,
            "precision": config.train.precision,
            "per_gpu_batch": config.batch.per_gpu,
            "gpus": machine.gpus,
            "gpu_memory_bytes": machine.memory_bytes,
            "boundaries": [self.boundary_record(step) for step in self.steps],
            "schedule": {
                "pace": self.pace,
                "policy": self.batch.policy,
                "interval_epochs": interval_epochs(config, self.layers),
                "batch_changes": batch_changes(self.epochs),
                "epochs": [self.epoch_record(epoch) for epoch in self.epochs],
            },
            "scaling": [
                {**asdict(point), "speed_up": point.speed_up} for point in (self.scaling() if self.can_time else [])
            ],
            "assumptions": self.assumptions(),
            "not_estimated": list(NOT_ESTIMATED),
        }

    def boundary_record(self, step: BoundaryStep) -> dict[str, Any]:
        """One boundary at the starting batch."""
        parts = step.memory.at(self.config.batch.per_gpu)
        memory = self.machine.memory_bytes
        macs = step.macs(self.machine.gpus)
        return {
            "boundary": step.boundary,
            "transition_layer": self.layers[step.boundary].name if step.boundary < len(self.layers) else None,
            "footprint_bytes": parts.total,
            **{f"{name}_bytes": value for name, value in asdict(parts).items()},
            "largest_batch": None if memory is None else step.memory.largest_batch(memory),
            "grad_all_reduce_bytes": step.gradient_bytes if self.machine.gpus > 1 else 0,
            "replica_sync_bytes": step.replica_bytes if self.machine.gpus > 1 else 0,
            "macs_per_image": asdict(macs),
        }

    def epoch_record(self, epoch: PlannedEpoch) -> dict[str, Any]:
        """One epoch, under the names that a run records."""
        traffic = self.traffic(epoch.boundary, epoch.per_gpu)
        seconds = self.seconds(epoch.boundary, epoch.per_gpu) if self.can_time else None
        return {
            "epoch": epoch.epoch,
            "boundary": epoch.boundary,
            "num_layers": len(self.layers),
            "per_gpu_batch": epoch.per_gpu,
            "global_batch": epoch.per_gpu * self.batches_per_step,
            "footprint_bytes": epoch.footprint,
            "num_steps": traffic.steps,
            "grad_all_reduce_bytes": traffic.gradient_bytes,
            "grad_all_reduce_count": traffic.gradient_collectives,
            "replica_sync_bytes": traffic.replica_bytes,
            "plain_ddp_bytes": self.plain_bytes(),
            "seconds": seconds,
            "plain_ddp_seconds": self.seconds(0, self.config.batch.per_gpu) if self.can_time else None,
            "images_per_second": None if seconds is None else self.data.num_train / seconds,
        }

    def _footprint(self, boundary: int, per_gpu: int) -> int:
        return self.steps[boundary].memory.at(per_gpu).total


def batch_changes(epochs: Sequence[PlannedEpoch]) -> list[dict[str, int]]:
    """The epochs (from 0) that begin with another batch."""
    return [
        {
            "epoch": after.epoch,
            "boundary": after.boundary,
            "per_gpu_from": before.per_gpu,
            "per_gpu_to": after.per_gpu,
            "footprint_bytes": after.footprint,
        }
        for before, after in pairwise(epochs)
        if after.per_gpu != before.per_gpu
    ]
