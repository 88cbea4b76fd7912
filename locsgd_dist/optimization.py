"""The optimizer of the SGD region, its learning-rate schedule, and the averaged model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass(frozen=True)
class OptimConfig:
    """How the SGD region learns."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer of the SGD region."""
    lr: float = 0.05
    """Learning rate at the configured global batch; > 0."""
    momentum: float = 0.9
    """Momentum of sgd, and the first beta of adamw; in [0, 1)."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: float = 5e-4
    """Weight decay (L2 for sgd, decoupled for adamw); >= 0."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to normalisations and biases as well."""
    schedule: Literal["constant", "cosine", "linear", "step"] = "cosine"
    """Course of the learning rate over the run: cosine and linear fall to optim.final_lr_fraction."""
    step_epochs: int = 30
    """step: epochs between two decays; >= 1."""
    step_gamma: float = 0.1
    """step: factor of a decay; in (0, 1]."""
    final_lr_fraction: float = 0.0
    """cosine, linear: learning rate at the end of the run, as a fraction of optim.lr; in [0, 1]."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from 0; >= 0."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy; in [0, 1)."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, evaluated beside them; 0 = none; in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be > 0, got {self.lr}")
        for key in ("momentum", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optim.{key} must lie in [0, 1), got {getattr(self, key)}")
        for key in ("weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"optim.{key} must be >= 0, got {getattr(self, key)}")
        if self.step_epochs < 1:
            raise ValueError(f"optim.step_epochs must be >= 1, got {self.step_epochs}")
        if not 0 < self.step_gamma <= 1:
            raise ValueError(f"optim.step_gamma must lie in (0, 1], got {self.step_gamma}")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"optim.final_lr_fraction must lie in [0, 1], got {self.final_lr_fraction}")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("optim.nesterov=true needs optim.name=sgd and optim.momentum > 0")


def lr_at(config: OptimConfig, epoch: float, epochs: int) -> float:
    """Learning rate after ``epoch`` epochs (a fraction of one counts) of a run of ``epochs``.

    Progress is measured in epochs, not steps: a batch size that changes leaves the schedule where it is.
    """
    match config.schedule:
        case "constant":
            factor = 1.0
        case "step":
            factor = config.step_gamma ** (math.floor(epoch + 1e-9) // config.step_epochs)
        case "cosine" | "linear":
            span = epochs - config.warmup_epochs
            done = min(1.0, max(0.0, (epoch - config.warmup_epochs) / span)) if span > 0 else 1.0
            left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
            factor = config.final_lr_fraction + (1 - config.final_lr_fraction) * left
    return config.lr * factor * warmup_factor(config, epoch)


def warmup_factor(config: OptimConfig, epoch: float) -> float:
    """Factor on a learning rate after ``epoch`` epochs: rises linearly from 0 to 1."""
    return epoch / config.warmup_epochs if epoch < config.warmup_epochs else 1.0


#: What torch keeps for each parameter.
_STATE_OF = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}


class RegionOptimizer:
    """The optimizer of a network whose parameters leave it one prefix after another.

    Momentum of a parameter that left would keep memory, and weight decay would still move it: both go. State is saved
    by parameter name, so that a checkpoint loads whatever the boundary was.

    Args:
        model: the network; parameters that require a gradient now are optimized.
        config: the ``optim`` section.
        keeps_released: refresh steps still train what has left: it stays, with its state, and moves in no other step,
            since it then has no gradient.
        carries_released: in those other steps its momentum moves it on (``localized.refresh_carry``); with sgd.
        hand_overs: epoch at which a parameter leaves the region, for those with a learning rate of their own until
            then (see :meth:`anneal`). Those that leave together share one, and so a group of torch's optimizer.
        fused: torch's fused kernels, which read on the device whether a step is to be left out; default: on CUDA.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        keeps_released: bool = False,
        carries_released: bool = False,
        hand_overs: Mapping[nn.Parameter, int] | None = None,
        fused: bool | None = None,
    ):
        self._name = config.name
        self._keeps_released = keeps_released
        self._carries_released = carries_released
        self._released: list[nn.Parameter] = []
        self._fused = next(model.parameters()).is_cuda if fused is None else fused
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm_and_bias = set() if config.decay_norm_and_bias else {p for p in trainable if p.dim() <= 1}
        if not trainable:
            raise ValueError("the network has no parameter that requires a gradient: nothing is left to train")
        alike: dict[tuple[int | None, float], list[nn.Parameter]] = {}
        for parameter in trainable:
            decay = 0.0 if parameter in norm_and_bias else config.weight_decay
            alike.setdefault(((hand_overs or {}).get(parameter), decay), []).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": parameters, "weight_decay": decay, "hand_over": hand_over}
            for (hand_over, decay), parameters in alike.items()
        ]
        kernels = {"fused": True} if self._fused else {"foreach": True}
        self._momentum = config.momentum if config.name == "sgd" else 0.0
        self._nesterov = config.nesterov
        if config.name == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, **kernels
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), **kernels)
        self._lr = config.lr
        self._fill_momentum()

    @property
    def lr(self) -> float:
        """Learning rate of all parameters but those with one of their own; setting it sets every parameter's."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = value
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def anneal(self, lr_until: Callable[[int], float]) -> None:
        """Sets the learning rates of parameters that have one of their own, after :attr:`lr` has been set.

        Args:
            lr_until: the present rate of those that leave at a given epoch.
        """
        for group in self.optimizer.param_groups:
            if group["hand_over"] is not None:
                group["lr"] = lr_until(group["hand_over"])

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forgets parameters that left the SGD region, and their state, unless refresh steps still train them."""
        leaving = set(parameters)
        if self._keeps_released:
            self._released += [p for group in self.optimizer.param_groups for p in group["params"] if p in leaving]
            return
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in leaving]
        for parameter in leaving:
            self.optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def cut(self, select: Callable[[str, Tensor], Tensor]) -> None:
        """Cuts the state of parameters that have become smaller.

        Args:
            select: gives what is left of a tensor of the named parameter's former shape.
        """
        for parameter in self.parameters:
            state = self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[key] = self._placed(select(self._names[parameter], value), parameter)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler | None = None, *, unless: Tensor | None = None) -> None:
        """One update of the SGD region.

        Args:
            scaler: of half precision; takes no step where a gradient overflowed.
            unless: a scalar on the device; where it is true, neither weights nor state move.
        """
        if not self.parameters:
            return
        if scaler is None:
            if self._fused:
                # Read on the device, so that the host need not wait for the backward pass.
                self.optimizer.found_inf = None if unless is None else unless.float()  # type: ignore[attr-defined]
                self.optimizer.step()
                self._carry_on(unless)
            elif unless is None or unless.is_meta or not unless:
                self.optimizer.step()
                self._carry_on()
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            if not gradients:
                return  # where the whole network is localized, a step between refresh steps: the scaler refuses it
            if unless is not None:
                # The scaler leaves out a step in which one gradient is not finite; it need not be one of those that
                # told: a loss may have none.
                min(gradients, key=Tensor.numel).mul_(torch.where(unless, torch.nan, 1.0))
            scaler.step(self.optimizer)
            scaler.update()

    @torch.no_grad()
    def _carry_on(self, unless: Tensor | None = None) -> None:
        """After a step: released parameters that had no gradient in it move as if it had been zero, without decay."""
        resting = [p for p in self._released if p.grad is None] if self._carries_released else []
        buffers = [(p, self.optimizer.state.get(p, {}).get("momentum_buffer")) for p in resting]
        moving: list[Tensor] = [p for p, buffer in buffers if buffer is not None]
        momenta = [buffer for _, buffer in buffers if buffer is not None]
        if not moving:
            return
        rate = self._lr * (self._momentum if self._nesterov else 1.0)
        if unless is None:
            torch._foreach_mul_(momenta, self._momentum)
            torch._foreach_add_(moving, momenta, alpha=-rate)
        else:
            # Decided on the device, so that the host need not wait: a factor of 1 and a step of length 0 do nothing.
            torch._foreach_mul_(momenta, torch.where(unless, 1.0, self._momentum))
            torch._foreach_addcmul_(moving, momenta, [torch.where(unless, 0.0, -rate)] * len(moving))

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Optimizer state by parameter name; rates and decays come from the configuration and the schedule."""
        state = self.optimizer.state
        return {self._names[p]: dict(state[p]) for p in self.parameters if p in state}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restores state by name, for the parameters that are still optimized.

        Raises:
            ValueError: it is the state of another optimizer.
        """
        foreign = {key for saved in state.values() for key in saved} - _STATE_OF[self._name]
        if foreign:
            raise ValueError(f"optim.name={self._name} cannot take another's state: {', '.join(sorted(foreign))}")
        self.optimizer.state.clear()
        for parameter in self.parameters:
            saved = state.get(self._names[parameter])
            if saved is not None:
                self.optimizer.state[parameter] = {key: self._placed(value, parameter) for key, value in saved.items()}

        self._fill_momentum()

    def _fill_momentum(self) -> None:
        """The fused kernel leaves momentum that it has just made as it came from the allocator where the first step is
        left out: zeros, which give the same first step, stand there before."""
        if self._fused and self._momentum > 0:
            for parameter in self.parameters:
                self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def _placed(self, value: Any, parameter: nn.Parameter) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape != parameter.shape:
            return value.to(parameter.device) if self._fused else value.clone()
        return torch.empty_like(parameter, requires_grad=False).copy_(value)


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of ``model``'s weights and buffers; ``update_parameters`` moves it."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
