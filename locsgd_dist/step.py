"""One training step, and one pass over a set for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from locsgd_dist.data import Batch
from locsgd_dist.distributed import Alignment, KeptOutputs, Refresh, RegionDDP, Replicas
from locsgd_dist.faults import StepGuard
from locsgd_dist.localized import LocalizedConfig
from locsgd_dist.optimization import RegionOptimizer


@dataclass(frozen=True)
class TrainConfig:
    """How long, where and in which arithmetic the network is trained."""

    epochs: int = 24
    """Epochs of the run; >= 1."""
    evaluate_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated; >= 1."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and drawn rules; >= 0, below 2^32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes this rank's GPU where there is one, else the CPU."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of forward passes; fp16 scales the loss."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last memory format."""
    compile: bool = False
    """torch.compile the network; it is compiled anew at each shift."""
    gradient_accumulation: int = 1
    """Batches per optimizer step; >= 1. The global batch is world size * batch.per_gpu * this."""
    deterministic: bool = False
    """Deterministic kernels and reduction order: same seed, ranks and batches give the same bits, at some speed."""

    def __post_init__(self) -> None:
        for key in ("epochs", "evaluate_every", "gradient_accumulation"):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key} must be >= 1, got {getattr(self, key)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed must be >= 0 and below 2^32, got {self.seed}")


class Tally:
    """Sums of loss and correct answers on the device: adding waits for nothing, :meth:`sums` does."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss_sum: Tensor, logits: Tensor, targets: Tensor) -> None:
        classes = targets if targets.dim() == 1 else targets.argmax(dim=1)
        correct = (logits.argmax(dim=1) == classes).sum()
        count = torch.full_like(correct, len(targets))
        self._sums += torch.stack([loss_sum.detach().double(), correct.double(), count.double()])

    def take(self, other: Tally, unless: Tensor) -> None:
        """Adds what ``other`` holds but where ``unless``, a scalar on the device, is true."""
        self._sums += torch.where(unless, torch.zeros_like(other._sums), other._sums)

    def load(self, sums: Sequence[float]) -> None:
        """Goes on from :meth:`sums`."""
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def sums(self) -> list[float]:
        """Loss, correct answers and samples, summed over what this rank has seen."""
        return self._sums.tolist()


class TrainStep:
    """Forward, loss, backward through the SGD region, one optimizer step, localized updates.

    Args:
        config: the ``train`` section.
        region: the network under data parallelism.
        replicas: of the localized region.
        optimizer: of the SGD region.
        guard: passes over steps that are not finite; None: one of its own.
        refresh: steps in which the localized region learns by its true gradient; None: none.
        alignment: steps in which the localized rule is compared with that gradient; None: none.
        kept: outputs of layers at rest, used again; None: none are.
        world_size: number of ranks.
        label_smoothing: of the cross-entropy.
        penalty: gives what is added to the loss of a step, a function of the weights; None for nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        region: RegionDDP,
        replicas: Replicas,
        optimizer: RegionOptimizer,
        *,
        guard: StepGuard | None = None,
        refresh: Refresh | None = None,
        alignment: Alignment | None = None,
        kept: KeptOutputs | None = None,
        world_size: int,
        device: torch.device,
        label_smoothing: float = 0.0,
        penalty: Callable[[], Tensor | None] = lambda: None,
    ):
        self._region = region
        self._replicas = replicas
        self._learner = replicas.learner
        never = LocalizedConfig()
        self._refresh = refresh or Refresh(self._learner, None, region.traffic, never)
        self._alignment = alignment or Alignment(self._learner, self._refresh, None, region.traffic, never)
        self._kept = kept
        self._optimizer = optimizer
        self._guard = guard or StepGuard(device)
        self._world_size = world_size
        self._label_smoothing = label_smoothing
        self._penalty = penalty
        self._device = device
        self._channels_last = config.channels_last
        self._num_telling = min(2, config.gradient_accumulation)
        self._autocast = autocast(config, device)
        self.scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None

    @property
    def model(self) -> nn.Module:
        return self._region.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer

    @property
    def is_update_due(self) -> bool:
        """Whether the present step computes localized updates; in any other the replicas of the region rest too."""
        return self._may_update and self._learner.is_update_due

    @property
    def _may_update(self) -> bool:
        # A refresh step that all of the batch takes gathers no localized update.
        return not self._refresh.is_due or self._refresh.fraction < 1

    def __call__(self, batches: Sequence[Batch], tally: Tally) -> None:
        """Takes one optimizer step on ``batches`` (its micro-batches on this rank; see ``gradient_accumulation``)."""
        samples = sum(batch.global_size for batch in batches)
        of_this_step = Tally(self._device)
        is_refresh = self._refresh.is_due
        is_measured, is_update = self._alignment.is_due, self.is_update_due
        self._guard.begin(self.model)
        passes = self._passes(batches, is_refresh=is_refresh, is_measured=is_measured)
        for each in passes[:-1]:
            with self._region.no_sync(), self._mode(each, is_measured=is_measured):
                self._forward_backward(each.batch, samples, of_this_step)
        # Where the last pass leaves the localized region out, its gradients travel beside that pass.
        is_reduced_early = not passes[-1].is_whole
        if (is_refresh or is_measured) and is_reduced_early:
            self._refresh.start_reducing(_whole_share(passes))
        if is_update:
            self._replicas.arm()
        with self._mode(passes[-1], is_measured=is_measured):
            self._forward_backward(passes[-1].batch, samples, of_this_step)
        if is_refresh or is_measured:
            if not is_reduced_early:
                self._refresh.start_reducing(_whole_share(passes))
            self._refresh.finish_reducing()
        if is_measured:
            self._alignment.measure()
        bad = self._guard.judge(self._optimizer.parameters)
        self._optimizer.step(self.scaler, unless=bad)
        self._optimizer.zero_grad()
        if is_update:
            self._replicas.finish_step(bad)
        if self._may_update:
            self._learner.finish_step()
        self._alignment.finish_step()
        self._refresh.finish_step()
        self._guard.end(bad)
        tally.take(of_this_step, unless=bad)

    def trial(self, per_gpu: int, input_shape: tuple[int, int, int], num_classes: int) -> None:
        """The memory of a step of ``per_gpu`` images and nothing else of it: every collective is off; buffers, random
        state and gathered updates are given back; weights and optimizer state do not move.

        Raises:
            RuntimeError, MemoryError: it did not fit (see ``is_out_of_memory``); all is given back then too.
        """
        model, device = self._region.module, self._device
        images = torch.zeros(per_gpu, *input_shape, device=device)
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = torch.arange(per_gpu, device=device) % num_classes
        buffers = [buffer.clone() for buffer in model.buffers()]
        self._learner.train()
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            self._learner.discarding(),
            self._region.no_sync(),
        ):
            try:
                # The dearest step there is at this boundary: the second micro-batch is the first beside gradients.
                batches = [Batch(images, targets, per_gpu, per_gpu)] * self._num_telling
                is_refresh, is_measured = self._refresh.enabled, self._alignment.enabled
                for each in self._passes(batches, is_refresh=is_refresh, is_measured=is_measured):
                    with self._mode(each, is_measured=is_measured):
                        self._forward_backward(each.batch, len(batches) * per_gpu, Tally(device))
            finally:
                self._alignment.discard()
                self._optimizer.zero_grad()
                # An optimizer that has released parameters does not know them any more.
                for parameter in self._learner.released:
                    parameter.grad = None
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)

    def _passes(self, batches: Sequence[Batch], *, is_refresh: bool, is_measured: bool) -> list[_Pass]:
        """What a step runs, in turn: the same on all ranks, whatever their share.

        Collectives lie in and between passes: of replicas, of the region, and DDP's own, which settles its buckets in
        the first pass of the second step.
        """
        if not is_refresh:
            return [_Pass(batch, is_whole=is_measured) for batch in batches]
        if self._refresh.fraction == 1:
            return [_Pass(batch, is_whole=True) for batch in batches]
        return [each for batch in batches for each in _divided(batch, self._refresh.fraction)]

    def _mode(self, of: _Pass, *, is_measured: bool) -> AbstractContextManager[None]:
        if not of.is_whole:
            return nullcontext()
        return self._alignment.mode() if is_measured else self._refresh.mode()

    def _around(self, batch: Batch) -> AbstractContextManager[None]:
        if self._kept is None or not batch.local_size:
            return nullcontext()
        return self._kept.around(batch.images, batch.keys)

    def _forward_backward(self, batch: Batch, samples: int, tally: Tally) -> None:
        model = self._region.module
        # Around the backward pass too, in which a region may be computed anew.
        with single_values_passing(model) if batch.local_size == 1 else nullcontext():
            # A rank without samples still joins every collective: one filler sample, in evaluation mode so that neither
            # running statistics nor localized updates see it.
            with (
                self._autocast,
                nullcontext() if batch.local_size else evaluation_mode(model),
                self._around(batch),
            ):
                logits = self._region(batch.images)
                loss_sum = F.cross_entropy(
                    logits.float(), batch.targets, reduction="sum", label_smoothing=self._label_smoothing
                )
            self._replicas.start()
            if batch.local_size:
                tally.add(loss_sum, logits, batch.targets)
            # DDP averages over ranks, whose shares of an epoch's last batch differ: weigh each sample by 1/samples.
            loss = loss_sum * (self._world_size / samples if batch.local_size else 0.0)
            if (penalty := self._penalty()) is not None:
                loss = loss + penalty * (batch.global_size / samples)
            loss = self._guard.watch(loss)
            if loss.requires_grad:
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass: through the whole network, or through the SGD region alone."""

    batch: Batch
    is_whole: bool


def _divided(batch: Batch, fraction: float) -> list[_Pass]:
    """The first samples of a batch, a share of ``fraction``, for the whole network; the rest for the SGD region."""
    size = batch.local_size
    # Neither part is a single sample, which batch statistics could not normalise.
    whole = min(size, max(2, math.ceil(size * fraction - 1e-9)))
    whole += size - whole == 1
    # Where nothing is left over, one sample stands in that counts for nothing.
    rest = slice(whole, None) if whole < size else slice(0, 1)
    # A rank without samples takes both passes too, with its filler sample. The step's samples over all ranks are
    # counted once, with the rest.
    passes = [(slice(0, whole or 1), 0, whole, True), (rest, batch.global_size, size - whole, False)]
    return [
        _Pass(Batch(batch.images[part], batch.targets[part], global_size, count), is_whole)
        for part, global_size, count, is_whole in passes
    ]


def _whole_share(passes: Sequence[_Pass]) -> float:
    """Share of this rank's samples that went through the whole network; 1 where it had none."""
    whole = sum(each.batch.local_size for each in passes if each.is_whole)
    return whole / sum(each.batch.local_size for each in passes) if whole else 1.0


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode inside, and in its own again after: norms may be held in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def single_values_passing(model: nn.Module) -> Iterator[None]:
    """Inside, a batch norm that is given one value per channel takes its running statistics: a single sample behind a
    pooling layer has no batch statistics, and torch refuses it."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]

    def hold(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm.training = inputs[0].numel() != inputs[0].shape[1]

    handles = [norm.register_forward_pre_hook(hold) for norm in norms]
    try:
        yield
    finally:
        for norm, handle in zip(norms, handles, strict=True):
            handle.remove()
            norm.training = True


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """Autocast to ``train.precision``; nothing for fp32. Reusable, not re-entrant."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if config.precision == "bf16" else torch.float16)
