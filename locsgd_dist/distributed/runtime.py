"""The process's place among the ranks: device, process groups, and numbers on which all ranks agree.

Two groups: one *data group* for gradients and replicas on the device's backend, one *control group* (gloo, host memory)
for the few numbers decisions are taken from, so that a decision never waits for the device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

_WATCHDOG_GRACE = timedelta(minutes=1)
ROLL_CALL = timedelta(seconds=20)
_A_YEAR_IN_MINUTES = 366 * 24 * 60


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks talk to each other."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Backend of the data group: auto takes nccl on CUDA and gloo on CPU."""
    timeout_minutes: float = 10.0
    """A collective that waits longer than this fails; > 0."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16 sends the SGD region's gradients in half the bytes; those of the localized region, in refresh steps, stay as
    they are."""
    bucket_mib: int | None = None
    """Size of the all-reduce buckets of the SGD region's gradients, in MiB, at least 1; null takes about an eighth
    of the region, at least 1 and at most 25: smaller hides more of the exchange, larger suits many ranks far apart."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_minutes <= _A_YEAR_IN_MINUTES:
            raise ValueError(f"distributed.timeout_minutes must be > 0 and at most a year, got {self.timeout_minutes}")
        if self.bucket_mib is not None and self.bucket_mib < 1:
            raise ValueError(f"distributed.bucket_mib must be null or >= 1, got {self.bucket_mib}")


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def environment_rank() -> int:
    """This process's rank as torchrun tells it; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def resolve_device(name: str) -> torch.device:
    """The device of this process for ``train.device``: auto takes this rank's GPU where there is one.

    Raises:
        ValueError: CUDA was asked for and is not there, or fewer GPUs than ranks on this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("train.device=cuda needs a CUDA GPU and driver, none was found; use train.device=cpu or auto")
    gpus = torch.cuda.device_count()
    if local_world_size > gpus:
        raise ValueError(
            f"train.device=cuda: {local_world_size} ranks on a machine with {gpus} GPUs; start at most {gpus} ranks "
            "(--nproc-per-node), or use train.device=cpu"
        )
    return torch.device("cuda", local_rank)


class Runtime:
    """Rank, world size, device and groups of this process. Without torchrun: a world of one, no group at all."""

    def __init__(self, device: torch.device, config: DistributedConfig | None = None):
        config = config or DistributedConfig()
        self.device = device
        self.rank = environment_rank()
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.data_group: dist.ProcessGroup | None = None
        self.control_group: dist.ProcessGroup | None = None
        self._roll_call_group: dist.ProcessGroup | None = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world_size > 1:
            backend = config.backend
            if backend == "auto":
                backend = "nccl" if device.type == "cuda" else "gloo"
            timeout = timedelta(minutes=config.timeout_minutes)
            # NCCL's watchdog ends the process at once; the control group, which runs out of time first, can say more.
            dist.init_process_group(
                backend,
                timeout=timeout + _WATCHDOG_GRACE if backend == "nccl" else timeout,
                device_id=device if backend == "nccl" else None,
            )
            self.data_group = dist.group.WORLD
            self.control_group = _gloo_group(timeout)
            # A group that has failed cannot be asked who is still there: this one carries nothing else.
            self._roll_call_group = _gloo_group(timeout)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of ``values`` over all ranks, in float64, alike on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def share(self, values: Sequence[float]) -> list[float]:
        """Rank 0's ``values`` (as many on every rank), in float64: for numbers that decide and may differ in a bit."""
        if self.control_group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(tensor, src=0, group=self.control_group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's ``value`` (any picklable object) in rank order on rank 0, None elsewhere."""
        if self.control_group is None:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0, group=self.control_group)
        return gathered

    def share_text(self, text: str) -> str:
        """Rank 0's ``text``."""
        if self.control_group is None:
            return text
        shared = [text]
        dist.broadcast_object_list(shared, src=0, group=self.control_group)
        return shared[0]

    def roll_call(self, patience: timedelta = ROLL_CALL) -> str:
        """After a collective has failed: which ranks no longer answer, as far as this one can tell.

        Args:
            patience: how long a rank may take to answer; passes whole where one does not.
        """
        if self._roll_call_group is None:
            return "there are no other ranks"
        try:
            dist.monitored_barrier(self._roll_call_group, timeout=patience, wait_all_ranks=True)
        except RuntimeError as error:
            if found := re.search(r"[Rr]anks?:? ([\d, ]+\d|\d) failed to pass monitoredBarrier", str(error)):
                return f"these ranks hang or are gone: {found[1]}"
            if self.is_main:  # a process that has ended closes its connections; gloo does not say whose they were
                return "another rank is gone: see what ended it, or which one torchrun names"
            return "rank 0 hangs or is gone, or found that another rank is: see its message"
        return "all ranks answer, so that the network or one slow rank held it up (distributed.timeout_minutes)"

    def barrier(self) -> None:
        if self.control_group is not None:
            dist.barrier(group=self.control_group)

    def close(self) -> None:
        if self.control_group is not None:
            self.data_group = self.control_group = self._roll_call_group = None
            dist.destroy_process_group()

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.control_group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.control_group)
        return tensor.tolist()
