"""Activation checkpointing of the localized region, for steps that backpropagate through it.

A refresh step (see :meth:`LocalizedLearner.refreshing`) needs the region's activations for its backward pass. Kept,
they would bring the footprint back to that of plain SGD; recomputed block by block they cost one more forward pass of
the region and the memory of its largest block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from locsgd_dist.localized.layers import LayerMap


@contextmanager
def recomputing(model: nn.Module, layers: LayerMap, boundary: int) -> Iterator[None]:
    """Inside, blocks that lie wholly in the localized region keep their inputs alone and run anew in the backward pass.

    Both passes belong inside. Running statistics of batch normalisations move once, in the first run; dropout draws the
    same mask in both. The network's modules, names and ``state_dict`` stay as they are.

    Args:
        model: the network whose layers ``layers`` are.
        boundary: layers ``l < boundary`` are the localized region.
    """
    inside = {layer.module for layer in layers[:boundary]}
    outside = {layer.module for layer in layers[boundary:]}
    with replaced_forwards() as replace:
        _patch(model, inside, outside, replace)
        yield


@contextmanager
def replaced_forwards() -> Iterator[Callable[[nn.Module, Callable[..., Any]], None]]:
    """Yields what gives a module another ``forward``; at the end each has its own again, its class's or one that was
    set on the module itself."""
    before: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
        before.append((module, module.__dict__.get("forward")))
        module.forward = forward

    try:
        yield replace
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _patch(
    module: nn.Module,
    inside: set[nn.Module],
    outside: set[nn.Module],
    replace: Callable[[nn.Module, Callable[..., Any]], None],
) -> None:
    """Descends to the outermost blocks without a layer outside; those of a chain of layers are taken by segments."""
    if type(module) is nn.Sequential:
        children = list(module)
        plain = [child for child in children if child in inside]
        if plain:
            # Layers of a bare chain (VGG): about sqrt(n) segments keep the sum of what is held and what is recomputed
            # at a time smallest.
            replace(module, _segmented(module, _segments(children, inside, outside, len(plain))))
        for child in children:
            if child not in inside:
                _patch(child, inside, outside, replace)
        return
    contained = set(module.modules())
    if module in inside or not contained & inside:
        return  # a lone layer keeps its input anyway: nothing is gained
    if contained & outside or isinstance(module, (nn.ModuleList, nn.ModuleDict)) or _holds_blocks(module, inside):
        for child in module.children():
            _patch(child, inside, outside, replace)
        return
    replace(module, _checkpointed(module.forward, module))


def _holds_blocks(module: nn.Module, inside: set[nn.Module]) -> bool:
    """Whether it is a stage or a network rather than a block: most of its layers lie in blocks of their own."""
    layers = [m for m in module.modules() if m in inside]
    blocks = [m for m in module.modules() if m is not module and m not in inside and type(m) is not nn.Sequential]
    in_blocks = {layer for block in blocks for layer in block.modules() if layer in inside}
    return 2 * len(in_blocks) > len(layers) and max(sum(m in inside for m in b.modules()) for b in blocks) >= 2


def _segments(
    children: Sequence[nn.Module], inside: set[nn.Module], outside: set[nn.Module], num_layers: int
) -> list[tuple[bool, list[nn.Module]]]:
    """A chain cut into segments of about sqrt(num_layers) layers; the flag says whether one is to be recomputed."""
    length = max(2, round(math.sqrt(num_layers)))
    segments: list[tuple[bool, list[nn.Module]]] = []
    count = 0
    for child in children:
        # From the first layer of the SGD region on, nothing is recomputed.
        recompute = not set(child.modules()) & outside and (not segments or segments[-1][0])
        is_layer = child in inside
        if not segments or segments[-1][0] != recompute or (is_layer and count == length):
            segments.append((recompute, []))
            count = 0
        count += is_layer
        segments[-1][1].append(child)
    return segments


def _segmented(chain: nn.Sequential, segments: list[tuple[bool, list[nn.Module]]]) -> Callable[[Any], Any]:
    def forward(x: Any) -> Any:
        for recompute, modules in segments:
            run = _in_turn(modules)
            x = _checkpoint(run, modules, x) if recompute and chain.training else run(x)
        return x

    return forward


def _in_turn(modules: Sequence[nn.Module]) -> Callable[[Any], Any]:
    def run(x: Any) -> Any:
        for module in modules:
            x = module(x)
        return x

    return run


def _checkpointed(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return _checkpoint(forward, [block], *args, **kwargs) if block.training else forward(*args, **kwargs)

    return run


def _checkpoint(function: Callable[..., Any], modules: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Any:
    norms = [m for module in modules for m in module.modules() if isinstance(m, _NormBase)]
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _held_statistics(norms)), **kwargs
    )


@contextmanager
def _held_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Batch statistics normalise inside, running statistics stay: a factor of zero leaves every bit of them."""
    moving = [norm for norm in norms if norm.training and norm.running_mean is not None]
    momenta = [norm.momentum for norm in moving]
    for norm in moving:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(moving, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
