"""Memory of a training step at every boundary, foretold on ``meta`` tensors: no GPU, no data, no weights.

The step is the trainer's own (`TrainStep`, the learner, the optimizer); only what needs other ranks or a device is
stood in for (`on_meta`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from locsgd_dist.annealing import hand_over_epochs
from locsgd_dist.config import Config
from locsgd_dist.data import Batch, DataShape
from locsgd_dist.distributed import Replicas
from locsgd_dist.distributed.replicas import assign_owners
from locsgd_dist.localized import Layer, LayerMap, LocalizedLearner
from locsgd_dist.memory.tensor_bytes import CUDA_ALLOCATION_BYTES, optimizer_state_tensors
from locsgd_dist.models import build_model
from locsgd_dist.optimization import RegionOptimizer, averaged_model
from locsgd_dist.planner.macs import noting_input_gradients
from locsgd_dist.planner.on_meta import QuickShapes, RefreshOnMeta, RegionOnMeta, ReplicasOnMeta
from locsgd_dist.planner.timeline import DearestStep, StepLog, StepMemory, StepTracker, Use
from locsgd_dist.step import Tally, TrainStep

META = torch.device("meta")


@dataclass(frozen=True)
class StepMacs:
    """Multiply-adds per image of one rank's step.

    Attributes:
        forward: of the whole network.
        backward: of the SGD region: weight gradients, and input gradients but where nothing before needs them.
        localized: updates of the localized region that the busiest rank computes, in the mean over steps.
        refresh: what refresh steps need on top, recomputation included, in the mean over steps.
    """

    forward: float
    backward: float
    localized: float
    refresh: float


@dataclass(frozen=True, eq=False)
class BoundaryStep:
    """A training step with the boundary at one place.

    Attributes:
        boundary: T.
        memory: of one rank, for any batch, in the dearest step.
        gradient_bytes: gradients of the SGD region, as they are sent (half under bf16 compression).
        parameter_bytes: of each parameter of the SGD region, in the order of their definition: DDP cuts buckets by
            these, compressed or not.
        forward_macs, backward_macs: multiply-adds per image, see :class:`StepMacs`.
        updated: layers that learn locally.
        update_macs: multiply-adds per image of each one's updates, in the mean over steps at the configured batch.
        shares_updates: whether the ranks divide the updated layers among them (replicas.mode=sharded).
        refresh_parameter_bytes: of each parameter of the localized region whose gradient a refresh step sends; empty
            without refresh steps.
        refresh_macs: multiply-adds per image that refresh steps need on top, in the mean over steps.
    """

    boundary: int
    memory: DearestStep
    gradient_bytes: int
    parameter_bytes: tuple[int, ...]
    forward_macs: int
    backward_macs: int
    updated: tuple[Layer, ...]
    update_macs: tuple[float, ...]
    shares_updates: bool
    refresh_parameter_bytes: tuple[int, ...]
    refresh_macs: float

    @property
    def refresh_bytes(self) -> int:
        """Gradients of the localized region, as a refresh step sends them."""
        return sum(self.refresh_parameter_bytes)

    @property
    def replica_bytes(self) -> int:
        """One exchange of the localized region's updates or weights, in float32; 0 where none learns."""
        return sum(4 * layer.weight.numel() for layer in self.updated)

    def macs(self, world_size: int) -> StepMacs:
        """Multiply-adds per image of the busiest of ``world_size`` ranks: the others wait for it."""
        useful_ranks = max(1, min(world_size, len(self.updated)))
        shares = assign_owners(self.updated, useful_ranks) if self.shares_updates else [self.updated]
        macs = {layer.index: macs for layer, macs in zip(self.updated, self.update_macs, strict=True)}
        localized = max(sum(macs[layer.index] for layer in share) for share in shares)
        return StepMacs(self.forward_macs, self.backward_macs, localized, self.refresh_macs)


class StepEstimator:
    """Walks a network from boundary to boundary and foretells its step at each.

    Args:
        config: the run; nothing of it is read from disk, weights least of all.
        shape: input and classes.
        world_size: number of ranks.
        rounding: granularity of an allocation in bytes; the CUDA allocator's by default, 1 for exact bytes.

    Raises:
        ValueError: the network is unknown or cannot run on ``meta`` tensors.
    """

    def __init__(self, config: Config, shape: DataShape, *, world_size: int, rounding: int = CUDA_ALLOCATION_BYTES):
        self._config = config
        self._shape = shape
        self._world_size = world_size
        self._rounding = rounding
        with META, self._foretellable():
            self._model = build_model(replace(config.model, weights=None), shape.num_classes).to(META)
        if config.train.channels_last:
            self._model.to(memory_format=torch.channels_last)
        self._average = averaged_model(self._model, config.optim.ema_decay) if config.optim.ema_decay else None
        with self._foretellable():
            self._learner = self._make_learner()
        self._region = RegionOnMeta(self._model, world_size, half_precision=config.train.precision != "fp32")
        self._replicas = (
            Replicas(self._learner) if world_size == 1 else ReplicasOnMeta(config.replicas, self._learner, world_size)
        )
        self._refresh = RefreshOnMeta(config.localized, self._learner, self._region, world_size)
        self._optimizer = RegionOptimizer(
            self._model,
            config.optim,
            keeps_released=self._refresh.enabled,
            hand_overs=hand_over_epochs(config, self.layers),
        )
        self._step = TrainStep(
            replace(config.train, precision="fp32"),  # the region casts: torch has no autocast on meta
            self._region,
            self._replicas,
            self._optimizer,
            refresh=self._refresh,
            world_size=world_size,
            device=META,
            label_smoothing=config.optim.label_smoothing,
        )
        self._model.train()
        with self._foretellable(), QuickShapes():  # the first step makes the optimizer's state
            self._take_step(config.batch.per_gpu)

    @property
    def layers(self) -> LayerMap:
        """The network's layers in execution order."""
        return self._learner.layers

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, those of the localized region included."""
        return list(self._model.parameters())

    def move_to(self, boundary: int) -> BoundaryStep:
        """The step with the boundary at ``boundary``, which never falls."""
        if boundary != self._learner.boundary:
            self._optimizer.release(self._learner.advance(boundary))
            self._region.refresh()
            self._replicas.refresh()
        kinds: list[StepMemory] = []
        backward_macs: dict[bool, int] = {}
        for is_refresh in self._kinds_of_steps():
            self._refresh.is_due = is_refresh
            memory, backward_macs[is_refresh] = self._foretell()
            kinds.append(memory)
        if False not in backward_macs:  # every step is one: what an ordinary one would need is not in its memory
            self._refresh.is_due = False
            _, backward_macs[False] = self._foretell()
        refreshes = True in backward_macs
        trainable = [p for p in self.parameters if p.requires_grad]
        updated = tuple(self._learner.updated_layers)
        compressed = self._config.distributed.gradient_compression == "bf16"
        return BoundaryStep(
            boundary,
            DearestStep(kinds),
            gradient_bytes=sum(p.numel() * (2 if compressed else p.element_size()) for p in trainable),
            parameter_bytes=_sizes(trainable),
            forward_macs=sum(layer.macs for layer in self.layers),
            backward_macs=backward_macs[False],
            updated=updated,
            update_macs=tuple(self._update_macs(layer) for layer in updated),
            shares_updates=self._config.replicas.mode == "sharded",
            refresh_parameter_bytes=_sizes(self._learner.released) if refreshes else (),
            refresh_macs=self._refresh_macs(backward_macs[True] - backward_macs[False]) if refreshes else 0,
        )

    def _kinds_of_steps(self) -> list[bool]:
        """Of the steps at this boundary, whether they are refresh steps; the same operations run in all of a kind."""
        if not self._refresh.enabled or not self._learner.boundary:
            return [False]
        return [True] if self._config.localized.refresh_every == 1 else [False, True]

    def _foretell(self) -> tuple[StepMemory, int]:
        """Memory of a step and multiply-adds per image of its backward pass, without recomputation."""
        per_gpu = self._config.batch.per_gpu
        with noting_input_gradients(self.layers) as with_input_gradient:
            first = self._logged_step(per_gpu)
        trained = self.layers[0 if self._refresh.is_due else self._learner.boundary :]
        macs = sum(layer.macs * (1 + (layer.index in with_input_gradient)) for layer in trained)
        return StepMemory((per_gpu, 2 * per_gpu), (first, self._logged_step(2 * per_gpu))), macs

    def _refresh_macs(self, backward_macs: int) -> float:
        """In the mean over steps, of what a refresh step on the whole batch needs more: its backward pass, and the
        region's forward pass where that runs anew."""
        localized = self._config.localized
        recomputed = sum(layer.macs for layer in self.layers[: self._learner.boundary])
        macs = backward_macs + localized.refresh_recompute * recomputed
        return macs * localized.refresh_fraction / localized.refresh_every

    def _update_macs(self, layer: Layer) -> float:
        per_gpu, localized = self._config.batch.per_gpu, self._config.localized
        macs = self._learner.rule.macs(layer, self._learner.num_used(per_gpu))
        # What backpropagates through the region computes no update.
        refreshed = localized.refresh_fraction / localized.refresh_every if localized.refresh_every else 0.0
        return macs / per_gpu / localized.update_every * (1 - refreshed)

    def _logged_step(self, per_gpu: int) -> StepLog:
        tracker = StepTracker(rounding=self._rounding)
        average = [] if self._average is None else [*self._average.parameters(), *self._average.buffers()]
        tracker.holding([*self._model.parameters(), *self._model.buffers(), *average], Use.PARAMETERS)
        tracker.holding(optimizer_state_tensors(self._optimizer.optimizer), Use.OPTIMIZER_STATE)
        if self._region.buckets is not None:
            tracker.holding([self._region.buckets], Use.GRADIENTS)
        self._refresh.watch_bucket = lambda flat: tracker.mark(flat, Use.GRADIENTS)
        with self._refresh.mode() if self._refresh.is_due else nullcontext():
            handles = [
                p.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, Use.GRADIENTS))
                for p in self.parameters
                if p.requires_grad
            ]
        try:
            with QuickShapes(), tracker.quiet():
                self._take_step(per_gpu)
        finally:
            self._refresh.watch_bucket = None
            for handle in handles:
                handle.remove()
        return tracker.log()

    def _take_step(self, per_gpu: int) -> None:
        images = torch.empty(per_gpu, self._shape.channels, *2 * (self._shape.image_size,), device=META)
        if self._config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        batch = Batch(images, torch.zeros(per_gpu, dtype=torch.int64, device=META), per_gpu * self._world_size, per_gpu)
        # Of accumulated micro-batches the second is the first that runs beside gradients; more are like it.
        batches = [batch] * min(2, self._config.train.gradient_accumulation)
        self._step(batches, Tally(META))

    @contextmanager
    def _foretellable(self) -> Iterator[None]:
        """Inside, the network meets ``meta`` tensors for the first time; what it does with them is its own affair."""
        try:
            yield
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"model.name {self._config.model.name} cannot be planned: it does not run on tensors without values "
                f"({reason})"
            ) from error

    def _make_learner(self) -> LocalizedLearner:
        example = torch.empty(1, self._shape.channels, *2 * (self._shape.image_size,), device=META)
        return LocalizedLearner(
            self._model,
            example,
            rule=self._config.localized.make_rule(self._config.train.seed),
            batch_fraction=self._config.localized.batch_fraction,
        )


def _sizes(parameters: Sequence[nn.Parameter]) -> tuple[int, ...]:
    return tuple(p.numel() * p.element_size() for p in parameters)
