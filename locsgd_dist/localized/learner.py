"""The localized region: a growing prefix of layers that learns in the forward pass.

Anybody's training loop can use it:

    learner = LocalizedLearner(model, example_input, rule="hebbian")
    for epoch in range(epochs):
        for x, y in loader:
            loss_function(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad()
            learner.apply()
        released = learner.advance(boundary)   # then drop `released` from the optimizer and re-wrap DDP

Layers are numbered in execution order, so switching ``requires_grad`` off for the prefix is enough for autograd to stop
at the boundary and to keep none of the prefix's activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from locsgd_dist.localized.layers import Layer, trace_layers
from locsgd_dist.localized.recompute import recomputing
from locsgd_dist.localized.rules import LocalizedRule, make_rule


class LocalizedLearner:
    """Gathers localized updates in the forward pass of layers ``l < boundary`` and applies them in one fused step.

    Args:
        model: the network; hooks are added to layers as the boundary passes them, its ``state_dict`` keeps its keys.
        example_input: a batch that ``model`` runs on (see :func:`trace_layers`).
        rule: a rule's registered name, or a rule.
        lr: length of a step (eta of eq. 4).
        batch_fraction: share of the batch from which updates are computed.
        update_every: steps between two that compute updates; call :meth:`finish_step` at the end of each.
        seed: of rules that draw random numbers.
        hold_statistics: batch norms of the localized region stay in evaluation mode (see :meth:`train`).

    Attributes:
        layers: the network's layers in execution order.
        boundary: T; layers ``l < T`` are the localized region. It never falls.
        lr, sign: the step is ``sign * lr``; set them at any time.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Any, ...],
        rule: str | LocalizedRule = "hebbian",
        *,
        lr: float = 0.01,
        batch_fraction: float = 1.0,
        update_every: int = 1,
        seed: int = 0,
        hold_statistics: bool = False,
    ):
        self.layers = trace_layers(model, example_input)
        self.rule = make_rule(rule, seed) if isinstance(rule, str) else rule
        self.lr = lr
        self.sign = 1.0
        self.batch_fraction = batch_fraction
        self.update_every = update_every
        self.hold_statistics = hold_statistics
        self.boundary = 0
        self._model = model
        self._released: list[nn.Parameter] = []
        self._backpropagates = False
        self._gathers = True
        self._observed: dict[int, Tensor] | None = None
        self._rests_after(0)
        self._num_steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self._updated: list[Layer] = []
        self._deltas: dict[int, Tensor] = {}
        self._gathered: frozenset[int] | None = None

    @property
    def num_steps(self) -> int:
        """Localized updates applied so far."""
        return int(self._num_steps)

    @property
    def updated_layers(self) -> list[Layer]:
        """The localized layers that the rule updates, in execution order."""
        return list(self._updated)

    def advance(self, boundary: int) -> list[nn.Parameter]:
        """Moves the boundary forward: layers below it stop receiving gradients and begin to learn locally.

        A layer whose weight the caller had frozen (``requires_grad`` off) stays frozen.
        Updates gathered so far are dropped; apply them first.

        Returns:
            The parameters that left the SGD region, for the caller to drop from the optimizer; a wrapped model must be
            wrapped anew.

        Raises:
            ValueError: ``boundary`` lies behind the present one or beyond the last layer.
        """
        if not self.boundary <= boundary <= len(self.layers):
            raise ValueError(
                f"the boundary never falls: it must lie in [{self.boundary}, {len(self.layers)}], got {boundary}"
            )
        self._deltas.clear()
        if self.rule.updates:
            for layer in self.layers[self.boundary : boundary]:
                if layer.updatable and layer.weight.requires_grad:
                    layer.module.register_forward_hook(_GatherHook(self, layer), with_kwargs=True)
                    self._updated.append(layer)
        released = list(self.layers.parameters(self.boundary, boundary).values())
        self._released += [parameter for parameter in released if parameter.requires_grad]
        for parameter in released:
            parameter.requires_grad_(False)
            parameter.grad = None
        self.boundary = boundary
        return released

    def train(self) -> None:
        """Puts the network into training mode, but for batch norms whose statistics are held. Call it in the place of
        ``model.train()``, which would set those going again."""
        self._model.train()
        if self.hold_statistics:
            for layer in self.layers[: self.boundary]:
                for norm in layer.norms:
                    norm.eval()

    @property
    def is_update_due(self) -> bool:
        """Whether the present step computes updates: every ``update_every``-th does, the others do nothing."""
        return not self._rests

    def finish_step(self) -> None:
        """Call at the end of every training step but refresh steps, which are not counted."""
        self._rests_after((self._steps_since_update + 1) % self.update_every)

    def _rests_after(self, steps: int) -> None:
        self._steps_since_update = steps
        # A flag, not a comparison of counts: a compiled network has one graph for each value that its hooks read.
        self._rests = steps + 1 < self.update_every

    def num_used(self, batch: int) -> int:
        """Samples of a batch from which an update is computed."""
        return max(1, round(batch * self.batch_fraction))

    def gather_only(self, indices: Iterable[int] | None) -> None:
        """Computes updates of these layers only (None: of all): what a rank owns when ranks share the work."""
        self._gathered = None if indices is None else frozenset(indices)

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Updates gathered inside are forgotten, those gathered before are kept: for a step that is only tried, as one
        that computes updates."""
        before, self._deltas = self._deltas, {}
        rests, self._rests = self._rests, False
        try:
            yield
        finally:
            self._deltas = before
            self._rests = rests

    @contextmanager
    def observing(self) -> Iterator[dict[int, Tensor]]:
        """Around one forward pass and its backward pass: gives the updates of that pass by layer, computed also where
        none are gathered. What is to be gathered is gathered all the same."""
        assert self._observed is None
        self._observed = {}
        try:
            yield self._observed
        finally:
            self._observed = None

    @property
    def released(self) -> list[nn.Parameter]:
        """Parameters that have left the SGD region so far: those that a refresh step trains again."""
        return list(self._released)

    @contextmanager
    def refreshing(self, *, recompute: bool = False, gathers: bool = False) -> Iterator[None]:
        """A step by the true gradient for the localized region too: forward and backward pass belong inside.

        After it the gradients of :attr:`released` stay in ``grad``, for the
        caller to reduce over ranks, to step with and to set to None.

        Args:
            recompute: keep only the inputs of the region's blocks and run them anew in the backward pass; then exactly
                one forward pass belongs inside :meth:`observing`.
            gathers: gather localized updates as in any other step; by default none are.
        """
        for parameter in self._released:
            parameter.requires_grad_(True)
        self._backpropagates, self._gathers = True, gathers
        try:
            with recomputing(self._model, self.layers, self.boundary) if recompute else nullcontext():
                yield
        finally:
            self._backpropagates, self._gathers = False, True
            for parameter in self._released:
                parameter.requires_grad_(False)

    @property
    def deltas(self) -> dict[int, Tensor]:
        """Updates gathered since the last :meth:`apply`, by layer: float32, summed over batches, not yet normalised."""
        return self._deltas

    @torch.no_grad()
    def apply(self, num_steps: int = 1, *, unless: Tensor | None = None) -> None:
        """Applies what has been gathered and forgets it: ``W <- W + sign * lr * dW / ||dW||``.

        Several forward passes before one call (gradient accumulation) add up like gradients do.

        Args:
            num_steps: training steps over which the updates were gathered; the step is that many times as long, so
                that a region updated every n-th step moves as far as one updated each step.
            unless: a scalar on the device; where it is true nothing moves. Nor does a layer whose update is not finite.
        """
        if self._deltas:
            indices = sorted(self._deltas)
            weights: list[Tensor] = [self.layers[index].weight for index in indices]
            deltas = [self._deltas[index] for index in indices]
            _clear_bad(deltas, unless)
            self.rule.step(weights, deltas, self.sign * self.lr * num_steps)
        self._deltas.clear()
        self._num_steps += num_steps

    def state_dict(self) -> dict[str, Any]:
        return {
            "boundary": self.boundary,
            "lr": self.lr,
            "sign": self.sign,
            "num_steps": self.num_steps,
            "steps_since_update": self._steps_since_update,
            "deltas": dict(self._deltas),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[nn.Parameter]:
        """Restores a learner; returns the parameters that left the SGD region, as :meth:`advance` does."""
        released = self.advance(state["boundary"])
        self.lr, self.sign = state["lr"], state["sign"]
        self._num_steps.fill_(state["num_steps"])
        self._rests_after(state["steps_since_update"] % self.update_every)
        self._deltas = {i: d.to(self.layers[i].weight.device) for i, d in state["deltas"].items()}
        return released

    def _gather(self, layer: Layer, a: Tensor, z: Tensor) -> None:
        if self._gathered is not None and layer.index not in self._gathered:
            return
        observed, gathers = self._observed, self._gathers and not self._rests
        # Whatever a pass shows twice runs anew for the backward pass.
        if layer.index in observed if observed is not None else not gathers:
            return
        if (a.requires_grad or z.requires_grad) and not self._backpropagates:
            raise RuntimeError(
                f"localized layer {layer.name!r} is part of the autograd graph: the input of the network, or a "
                f"parameter before layer {layer.index}, requires a gradient"
            )
        if self.batch_fraction < 1:
            samples = self.num_used(a.shape[0])
            a, z = a[:samples], z[:samples]
        with torch.no_grad(), _no_autocast(z.device.type):
            delta = self.rule.delta(layer, a.to(z.dtype), z, self._num_steps)
            if observed is not None:
                observed[layer.index] = delta.clone() if gathers else delta
            if not gathers:
                return
            if layer.index in self._deltas:
                self._deltas[layer.index].add_(delta)
            else:
                self._deltas[layer.index] = delta


def _clear_bad(deltas: list[Tensor], unless: Tensor | None) -> None:
    """Sets to zero the updates that are not finite, or all; on the device, without waiting for it."""
    clear = ~torch.stack(torch._foreach_norm(deltas)).isfinite()
    if unless is not None:
        clear |= unless
    # On the CPU the host knows at once, and saves a pass over the updates; fake tensors have no values to look at.
    if clear.device.type == "cpu" and type(clear) is Tensor and not clear.any():
        return
    for delta, is_bad in zip(deltas, clear.unbind(), strict=True):
        delta.masked_fill_(is_bad, 0.0)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would cast the GEMM's operands again; they are in the dtype the layer computed in already."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # meta tensors, on which a step is foretold without a device


class _GatherHook:
    """Forward hook of one layer. Updates are computed here: an in-place activation overwrites ``z`` right after."""

    def __init__(self, learner: LocalizedLearner, layer: Layer):
        self._learner = learner
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if module.training:
            self._learner._gather(self._layer, args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GatherHook:
        # A copy of the network (an averaged model, an export) must not learn, nor drag the learner along.
        return _GatherHook(_Detached(), self._layer)  # type: ignore[arg-type]


class _Detached:
    def _gather(self, layer: Layer, a: Tensor, z: Tensor) -> None:
        """A copied network gathers nothing."""
