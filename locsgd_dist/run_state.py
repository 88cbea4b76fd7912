"""All that a run needs to go on as if nothing had happened, taken from the parts that hold it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from locsgd_dist.baselines import Baseline
from locsgd_dist.batching import BatchController
from locsgd_dist.data.hashing import hash64
from locsgd_dist.data.streams import TrainStream
from locsgd_dist.distributed import (
    Alignment,
    KeptOutputs,
    Refresh,
    RegionDDP,
    Replicas,
    Runtime,
    Traffic,
    pool_states,
)
from locsgd_dist.faults import CollapseWatch, StepGuard
from locsgd_dist.localized import LocalizedLearner, WeakSupervision, WeightTrace
from locsgd_dist.localized.selection import Selector
from locsgd_dist.memory import FootprintMonitor
from locsgd_dist.optimization import RegionOptimizer
from locsgd_dist.progress import Progress, shared_out

FORMAT = 3


@dataclass(frozen=True)
class RunState:
    """The parts of a run that change while it trains. Between two steps their state is a checkpoint's content.

    Most of it is the same on all ranks and is saved once, as rank 0 has it. Each rank's own are: sums and times of the
    epoch, random state, batch-norm statistics since they were last pooled, weights of replicas that drift, updates that
    wait for their exchange.
    """

    runtime: Runtime
    seed: int
    progress: Progress
    model: nn.Module
    ema: AveragedModel | None
    learner: LocalizedLearner
    region: RegionDDP
    replicas: Replicas
    refresh: Refresh
    alignment: Alignment
    kept: KeptOutputs
    optimizer: RegionOptimizer
    scaler: torch.amp.GradScaler | None
    guard: StepGuard
    collapse: CollapseWatch
    baseline: Baseline
    selector: Selector
    supervision: WeakSupervision
    trace: WeightTrace
    batching: BatchController
    stream: TrainStream
    monitor: FootprintMonitor
    traffic: Traffic

    def capture(self) -> dict[str, Any] | None:
        """The state as a copy in host memory on rank 0, None elsewhere. Changes nothing; all ranks call it together."""
        ranks = self.runtime.gather(on_host(self._of_this_rank()))
        if ranks is None:
            return None
        under_way = self.progress.is_under_way
        state: dict[str, Any] = {
            "format": FORMAT,
            "world_size": self.runtime.world_size,
            "progress": self.progress.state_dict(),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "collapse": self.collapse.state_dict(),
            "learner": self.learner.state_dict(),
            "replicas": self.replicas.state_dict(),
            "refresh": self.refresh.state_dict(),
            "alignment": self.alignment.state_dict(),
            "baseline": self.baseline.state_dict(),
            "selector": self.selector.state_dict(),
            "supervision": self.supervision.state_dict(),
            "batching": self.batching.state_dict(),
            "stream": self.stream.state_dict() if under_way else None,
            "trace": self.trace.state_dict() if under_way else None,
            "traffic": self.traffic.state_dict(),
        }
        # Each waiting update is on the rank that owns its layer.
        state["learner"]["deltas"] = {i: delta for rank in ranks for i, delta in rank.pop("deltas").items()}
        # Whoever reads the network alone, or goes on with other ranks, finds what all ranks hold together.
        for network in ("model", "ema"):
            if state[network] is not None:
                state[network] = dict(state[network]) | pool_states([rank[network] for rank in ranks])
        return on_host(state | {"ranks": ranks})

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a captured state: boundary, wrap, optimizer, then the state of each part by name."""
        ranks, rank, world_size = state["ranks"], self.runtime.rank, self.runtime.world_size
        mine = ranks[rank] if len(ranks) == world_size else None
        # First: a pruned network has other shapes than the plain one.
        self.baseline.load_state_dict(state["baseline"])
        self.model.load_state_dict(_own(state["model"], mine, "model"))
        if self.ema is not None:
            if state["ema"] is None:  # of a run without: the average begins here
                self.ema.module.load_state_dict(self.model.state_dict())
            else:
                self.ema.load_state_dict(_own(state["ema"], mine, "ema"))
        self.optimizer.release(self.learner.load_state_dict(state["learner"]))
        self.region.refresh()
        self.replicas.refresh()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])
        self.collapse.load_state_dict(state["collapse"])
        self.replicas.load_state_dict(state["replicas"])
        self.refresh.load_state_dict(state["refresh"])
        self.alignment.load_state_dict(state["alignment"])
        self.selector.load_state_dict(state["selector"])
        self.supervision.load_state_dict(state["supervision"])
        self.traffic.load_state_dict(state["traffic"])
        own_progress = shared_out([other["progress"] for other in ranks], world_size)
        self.progress.load_state_dict(state["progress"], own_progress, rank)
        if kept := [other["kept"] for other in ranks if "kept" in other]:
            # Of an epoch that another number of ranks has begun, together: rank 0 counts for all.
            used = sum(other["num_used"] for other in kept) if rank == 0 else 0
            self.kept.load_state_dict(kept[rank] if mine else kept[0] | {"num_used": used})
        if self.progress.is_under_way:
            self.stream.load_state_dict(state["stream"])
            self.trace.load_state_dict(state["trace"])
            footprints = [other["monitor"] for other in ranks]
            self.monitor.load_state_dict(footprints[rank] if mine else max(footprints, key=lambda f: f["bytes"]))
        else:
            self.stream.set_epoch(self.progress.epoch)
        self.batching.load_state_dict(state["batching"])
        if mine is None:
            # Streams that no rank has drawn from before.
            seed_everything(hash64(self.seed, self.progress.samples_seen, rank))
        else:
            _set_random_state(mine["random"], self.runtime.device)

    def _of_this_rank(self) -> dict[str, Any]:
        under_way = self.progress.is_under_way
        return {
            "progress": self.progress.rank_state_dict(),
            "monitor": self.monitor.state_dict() if under_way else None,
            "random": _random_state(self.runtime.device),
            "deltas": self.learner.deltas,
            "kept": self.kept.state_dict(),
            # At an epoch's edge all networks are equal; their moving averages only where they were evaluated.
            "model": self._drifting(self.model) if under_way else {},
            "ema": {} if self.ema is None else self._drifting(self.ema.module, "module."),
        }

    def _drifting(self, model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """What of a network's state may differ between ranks in the middle of an epoch."""
        if self.runtime.world_size == 1:
            return {}
        names = {*self.replicas.drifting(), *(name for name, _ in model.named_buffers())}
        return {f"{prefix}{name}": value for name, value in model.state_dict().items() if name in names}


def on_host(value: Any) -> Any:
    """A deep copy with every tensor in host memory, which later training steps leave alone."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(item) for item in value)
    return value


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _own(shared: dict[str, Tensor], mine: dict[str, Any] | None, network: str) -> dict[str, Tensor]:
    return shared if mine is None else {**shared, **mine[network]}


def _random_state(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
