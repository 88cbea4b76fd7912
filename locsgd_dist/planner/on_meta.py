"""What a step needs to run on ``meta`` tensors as it would on a GPU: fast batch norms, autocast, DDP's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from locsgd_dist.distributed import Refresh, RegionDDP, ReplicaConfig, Replicas
from locsgd_dist.distributed.replicas import assign_owners
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner
from locsgd_dist.localized.recompute import replaced_forwards


class QuickShapes(TorchDispatchMode):
    """A few operations on ``meta`` by the shapes of their results alone.

    torch computes them there by decompositions in Python, which takes most of the time of an estimate. Results have the
    same shapes and types, and nothing else counts on ``meta``.
    """

    _LIKE_FIRST = frozenset((torch.ops.aten.threshold_backward.default,))
    _LIKE_FIRST_LIST = frozenset((torch.ops.aten._foreach_add.List, torch.ops.aten._foreach_div.List))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in self._LIKE_FIRST and args[0].is_meta:
            return _empty_like(args[0])
        if func in self._LIKE_FIRST_LIST and args[0][0].is_meta:
            return [_empty_like(tensor) for tensor in args[0]]
        if func is torch.ops.aten.native_batch_norm.default and args[0].is_meta and args[5]:
            x = args[0]
            dtype = torch.promote_types(x.dtype, torch.float32)
            mean, inverse_deviation = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
            return _empty_like(x), mean, inverse_deviation
        if func is torch.ops.aten.native_batch_norm_backward.default and args[0].is_meta and args[7]:
            gradient, _, weight = args[:3]
            wants_input, *wants_affine = args[9]
            affine = [_empty_like(weight) if wanted else None for wanted in wants_affine]
            return (_empty_like(gradient) if wants_input else None, *affine)
        return func(*args, **(kwargs or {}))


def _empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like``, which on ``meta`` is a decomposition too, by way of the common memory formats."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if tensor.is_contiguous(memory_format=memory_format):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", memory_format=memory_format)
    return torch.empty_like(tensor)


class AutocastOnMeta(TorchFunctionMode):
    """What autocast does on a GPU to the types of tensors, for ``meta``, where torch has no autocast.

    Products run in half precision; what sums many terms (layer norms, softmax, losses) in single precision. Everything
    else takes its operands as they come.

    Args:
        keeps_casts: cast each weight once and keep that until the end, as one forward pass does.
    """

    _HALF = frozenset(
        (
            *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
            *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.addmm, torch.einsum),
            F.scaled_dot_product_attention,
        )
    )
    _SINGLE = frozenset((F.layer_norm, F.group_norm, F.softmax, torch.softmax, F.log_softmax, F.cross_entropy))

    def __init__(self, *, keeps_casts: bool = True) -> None:
        super().__init__()
        self._keeps_casts = keeps_casts
        self._weights: dict[nn.Parameter, Tensor] = {}

    def __enter__(self) -> Self:
        self._weights.clear()
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._weights.clear()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._HALF:
            args, kwargs = tree_map_only(Tensor, self._halved, (args, kwargs))
        elif func in self._SINGLE:
            args, kwargs = tree_map_only(Tensor, self._single, (args, kwargs))
        return func(*args, **kwargs)

    def _halved(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter) or not self._keeps_casts:
            return tensor.to(torch.bfloat16)
        if tensor not in self._weights:
            self._weights[tensor] = tensor.to(torch.bfloat16)
        return self._weights[tensor]

    @staticmethod
    def _single(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor


class RegionOnMeta(RegionDDP):
    """DDP's memory without the ranks: buckets live as long as the wrapper, and gradients come to lie in them.

    Attributes:
        buckets: one flat tensor for the gradients of the SGD region; None where nothing is reduced.
    """

    buckets: Tensor | None = None

    def __init__(self, model: nn.Module, world_size: int, *, half_precision: bool = False):
        self._world_size = world_size
        self._autocast = AutocastOnMeta() if half_precision else None
        self._handles: list[Any] = []
        self._in_forward = False
        self.syncs = True
        super().__init__(model, None)

    def __call__(self, *args: Any) -> Any:
        if self._autocast is None:
            return self.module(*args)
        self._in_forward = True
        try:
            with self._autocast:
                return self.module(*args)
        finally:
            self._in_forward = False

    @contextmanager
    def casting_in_recomputation(self) -> Iterator[None]:
        """Inside, modules that run outside a forward pass (anew, in the backward pass) do so in its types: the mode is
        not in force there, where torch brings the real autocast back."""
        modules = [] if self._autocast is None else list(self.module.modules())[1:]
        with replaced_forwards() as replace:
            for module in modules:
                replace(module, self._casting(module.forward))
            yield

    def _casting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self._in_forward else AutocastOnMeta(keeps_casts=False):
                return forward(*args, **kwargs)

        return run

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.syncs = False
        try:
            yield
        finally:
            self.syncs = True

    def refresh(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        self._wrap(init_sync=False)  # and no garbage is collected: nothing on meta needs it

    def _wrap(self, *, init_sync: bool) -> None:
        for handle in self._handles:
            handle.remove()
        self.buckets, self._handles = None, []
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if self._world_size == 1 or not parameters:
            return
        self.buckets = torch.empty(sum(p.numel() for p in parameters), device="meta")
        views = self.buckets.split([p.numel() for p in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            hook = _into_bucket(self, view.view_as(parameter))
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))


def _into_bucket(region: RegionOnMeta, view: Tensor) -> Any:
    """DDP copies a gradient into its bucket once it is whole, and lets the original go."""

    def move(parameter: Tensor) -> None:
        if region.syncs:
            parameter.grad = view

    return move


class ReplicasOnMeta(Replicas):
    """The memory of a rank that exchanges updates of the localized region, without the other ranks.

    It stands for the rank with most updates to gather, in a step that exchanges them.
    """

    def __init__(self, config: ReplicaConfig, learner: LocalizedLearner, world_size: int):
        super().__init__(learner)
        self._config = config
        self._world_size = world_size
        self._armed = False
        self._exchanged: Tensor | None = None
        gathers = config.mode == "sharded" and config.every > 1
        self._window_is_bad = torch.zeros((), dtype=torch.bool, device="meta") if gathers else None

    def refresh(self) -> None:
        if self._config.mode == "sharded":
            shares = assign_owners(self.learner.updated_layers, self._world_size)
            heaviest = max(shares, key=lambda share: sum(layer.weight.numel() for layer in share))
            self.learner.gather_only(layer.index for layer in heaviest)

    def arm(self) -> None:
        self._armed = True

    def start(self) -> None:
        layers = self.learner.updated_layers if self._armed else []
        self._armed = False
        if layers and self._config.mode != "periodic":
            self._exchanged = torch.empty(sum(layer.weight.numel() for layer in layers), device="meta")

    def finish_step(self, bad: Tensor | None = None) -> None:
        if bad is not None and self._window_is_bad is not None:
            bad = bad | self._window_is_bad
        if self._exchanged is not None:
            layers = self.learner.updated_layers
            parts = self._exchanged.split([layer.weight.numel() for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                self.learner.deltas[layer.index] = part.view_as(layer.weight)
            self._exchanged = None
        super().finish_step(bad)


class RefreshOnMeta(Refresh):
    """The memory of refresh steps, whose buckets live only while they travel, without the other ranks.

    Attributes:
        is_due: set it; on meta no steps are counted.
        watch_bucket: told of each bucket, in which gradients come to lie.
    """

    is_due = False
    watch_bucket: Callable[[Tensor], None] | None = None

    def __init__(self, config: LocalizedConfig, learner: LocalizedLearner, region: RegionOnMeta, world_size: int):
        super().__init__(learner, None, region.traffic, config)
        self._region = region
        self._world_size = world_size

    @contextmanager
    def mode(self) -> Iterator[None]:
        with self._region.casting_in_recomputation(), super().mode():
            yield

    def _start_all_reduce(self, flat: Tensor) -> Callable[[], object]:
        if self.watch_bucket is not None:
            self.watch_bucket(flat)
        return lambda: None
