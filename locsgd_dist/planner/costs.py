"""Traffic and time in closed form: multiply-adds, and the alpha-beta model of collectives on a ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locsgd_dist.distributed import ReplicaConfig, bucket_mib
from locsgd_dist.distributed.buckets import REFRESH_BUCKET_BYTES, cut
from locsgd_dist.localized import LocalizedConfig
from locsgd_dist.planner.footprint import BoundaryStep


@dataclass(frozen=True)
class Machine:
    """What the run is planned for.

    Attributes:
        gpus: ranks, one per GPU.
        flops_per_second: sustained by one GPU; None: no times.
        bytes_per_second: of each GPU's link, in each direction; None: no times.
        latency_seconds: of one message.
        memory_bytes: of each GPU, as far as the step may use it; None: unlimited.
    """

    gpus: int = 1
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    latency_seconds: float = 10e-6
    memory_bytes: int | None = None


@dataclass(frozen=True)
class EpochTraffic:
    """Payload of one rank over an epoch, each collective counted once.

    Attributes:
        steps: optimizer steps.
        gradient_bytes, gradient_collectives: all-reduces, one per bucket and step, those of refresh steps included.
        replica_bytes, replica_exchanges: what keeps replicas of the localized region equal.
        refresh_bytes, refresh_collectives: of the gradients those of the localized region, in refresh steps.
    """

    steps: int
    gradient_bytes: int
    gradient_collectives: int
    replica_bytes: int
    replica_exchanges: int
    refresh_bytes: int = 0
    refresh_collectives: int = 0


def num_steps(num_train: int, images_per_step: int) -> int:
    """Optimizer steps of an epoch; the last may hold fewer images."""
    return -(-num_train // images_per_step)


def num_buckets(parameter_bytes: Sequence[int], mib: int | None = None) -> int:
    """All-reduces per step for gradients of these sizes: from the last backwards, each bucket until it is full.

    So DDP cuts them from the second step after a shift on. In the first all of them travel in one bucket; under
    train.deterministic it begins at the other end throughout, which may make one bucket more or less.

    Args:
        parameter_bytes: of each parameter, in the order of their definition, uncompressed.
        mib: ``distributed.bucket_mib``.
    """
    return len(cut(parameter_bytes[::-1], (mib or bucket_mib(sum(parameter_bytes))) << 20))


def epoch_traffic(
    step: BoundaryStep,
    steps: int,
    gpus: int,
    replicas: ReplicaConfig,
    localized: LocalizedConfig | None = None,
    mib: int | None = None,
) -> EpochTraffic:
    """What one rank sends in an epoch of ``steps`` at that boundary; nothing on one GPU.

    Args:
        localized: which steps are refresh steps, and which of the others compute updates; by default none, and all.
        mib: ``distributed.bucket_mib``.
    """
    if gpus == 1:
        return EpochTraffic(steps, 0, 0, 0, 0)
    localized = localized or LocalizedConfig()
    refreshes = steps // localized.refresh_every if localized.refresh_every and step.refresh_bytes else 0
    updates = steps - refreshes if localized.refresh_fraction == 1 else steps
    # At an epoch's end whatever is pending is exchanged, so that a window cut short costs as much as a whole one.
    updates = -(-updates // localized.update_every)
    exchanges = updates if replicas.mode == "all_reduce" else -(-updates // replicas.every)
    exchanges = exchanges if step.replica_bytes else 0
    refresh_bytes = refreshes * step.refresh_bytes
    refresh_collectives = refreshes * len(cut(step.refresh_parameter_bytes, REFRESH_BUCKET_BYTES))
    return EpochTraffic(
        steps,
        gradient_bytes=steps * step.gradient_bytes + refresh_bytes,
        gradient_collectives=steps * num_buckets(step.parameter_bytes, mib) + refresh_collectives,
        replica_bytes=exchanges * step.replica_bytes,
        replica_exchanges=exchanges,
        refresh_bytes=refresh_bytes,
        refresh_collectives=refresh_collectives,
    )


def all_reduce_seconds(num_bytes: float, collectives: float, machine: Machine) -> float:
    """Ring all-reduce: every byte crosses each link 2 (n-1)/n times, a collective takes 2 (n-1) messages in turn."""
    assert machine.bytes_per_second is not None
    n = machine.gpus
    return 2 * (n - 1) * (num_bytes / n / machine.bytes_per_second + collectives * machine.latency_seconds)


def broadcast_seconds(num_bytes: float, collectives: float, machine: Machine) -> float:
    """Pipelined broadcast along a ring: every byte crosses each link once, n-1 messages until the last rank has it."""
    assert machine.bytes_per_second is not None
    if machine.gpus == 1:
        return 0.0
    return num_bytes / machine.bytes_per_second + (machine.gpus - 1) * collectives * machine.latency_seconds


@dataclass(frozen=True)
class EpochTime:
    """Seconds of one epoch.

    Attributes:
        forward: forward passes.
        localized: localized updates, on the busiest rank.
        backward: backward passes, those of refresh steps included.
        exchange: gradients of the SGD region and replicas, as if nothing ran beside them; those of the localized region
            too where a part of each batch refreshes it. These hide beside the pass of the rest of that batch alone, so
            that ``total`` is then a lower bound.
        refresh_exchange: the localized region's gradients where whole batches refresh it, which are sent after the
            backward pass.
    """

    forward: float
    localized: float
    backward: float
    exchange: float
    refresh_exchange: float = 0.0

    @property
    def total(self) -> float:
        """The exchange runs beside the backward pass and shows only where it takes longer; that of refresh steps
        of whole batches runs beside nothing."""
        return self.forward + self.localized + max(self.backward, self.exchange) + self.refresh_exchange


def epoch_time(
    step: BoundaryStep,
    traffic: EpochTraffic,
    *,
    num_train: int,
    machine: Machine,
    replicas: ReplicaConfig,
    localized: LocalizedConfig | None = None,
) -> EpochTime:
    """Seconds of an epoch: two operations per multiply-add at the GPU's rate, collectives as modelled above.

    Args:
        localized: as for :func:`epoch_traffic`.
    """
    assert machine.flops_per_second is not None
    per_mac = 2 * num_train / machine.gpus / machine.flops_per_second
    macs = step.macs(machine.gpus)
    refresh_exchange = all_reduce_seconds(traffic.refresh_bytes, traffic.refresh_collectives, machine)
    exchange = all_reduce_seconds(traffic.gradient_bytes, traffic.gradient_collectives, machine)
    if localized is not None and localized.refresh_fraction < 1:
        refresh_exchange = 0.0
    exchange -= refresh_exchange
    if replicas.mode == "sharded":
        owners = min(machine.gpus, len(step.updated))
        exchange += broadcast_seconds(traffic.replica_bytes, traffic.replica_exchanges * owners, machine)
    else:
        exchange += all_reduce_seconds(traffic.replica_bytes, traffic.replica_exchanges, machine)
    backward = macs.backward + macs.refresh
    return EpochTime(per_mac * macs.forward, per_mac * macs.localized, per_mac * backward, exchange, refresh_exchange)
