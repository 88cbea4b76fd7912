"""Where a network can be cut in two, so that what its first layers say of an image can be kept and used again.

Layers at rest give the same outputs for the same image in every epoch. A cut is a module whose output is all that the
layers behind it need to know of the image; whether that is so is tried, not read off the network's structure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from locsgd_dist.localized.layers import LayerMap
from locsgd_dist.localized.modes import evaluation_mode
from locsgd_dist.localized.recompute import replaced_forwards

_PROBES = 3  # images of a trial: their outputs must not depend on how many there are


class Cut:
    """A network taken apart behind one of its modules; :func:`find_cut` finds one.

    Attributes:
        module: the last one before the cut.
        num_layers: layers before the cut: 0 ... num_layers - 1.
        shape: of one image's output there.
    """

    def __init__(self, model: nn.Module, exit: _Exit, shape: Sequence[int]):
        self.module = exit.module
        self.num_layers = exit.num_layers
        self.shape = tuple(shape)
        self._model = model
        self._skipped = exit.skipped

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """[n, \\*shape] what the layers before the cut make of ``images``; those behind it do not run."""
        handle = self.module.register_forward_hook(_leave)
        try:
            self._model(images)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError("the network did not come by the cut")

    @contextmanager
    def behind(self, outputs: Tensor) -> Iterator[None]:
        """Forward passes inside take ``outputs`` for what the layers before the cut say, and do not run those, whatever
        images of that number they are given."""
        with replaced_forwards() as replace:
            for module, shapes in self._skipped.items():
                replace(module, _standing_in(module.forward, shapes, outputs))
            replace(self.module, lambda *args, **kwargs: outputs)
            yield


def find_cut(model: nn.Module, layers: LayerMap, boundary: int, images: Tensor) -> Cut | None:
    """The last cut that lies wholly before layer ``boundary``; None where the network has none.

    The network runs a few times in evaluation mode without gradients: its buffers and the random state stay.

    Args:
        model: the network whose layers ``layers`` are.
        images: an example, ``[1, ...]``, for its shape, dtype and device.
    """
    generator = torch.Generator().manual_seed(0)
    size = (_PROBES, *images.shape[1:])
    first, second = (torch.randn(size, generator=generator).to(images) for _ in range(2))
    with evaluation_mode(model), torch.no_grad():
        exits = _exits(model, layers, first)
        last = min(boundary, len(layers) - 1)
        for exit in reversed([exit for exit in exits if 0 < exit.num_layers <= last]):
            cut = Cut(model, exit, exit.output_shape[1:])
            if _is_whole(cut, model, layers, first, second):
                return cut
    return None


def is_repeatable(cut: Cut, images: Tensor) -> bool:
    """Whether the layers before the cut give an image the same output each time, in the modes in which they are now,
    and whatever other images are beside it: no dropout, no normalisation by the batch.

    Args:
        images: an example, ``[1, ...]``, for its shape, dtype and device.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(_PROBES, *images.shape[1:], generator=generator).to(images)
        together, again, alone = cut.outputs(images), cut.outputs(images), cut.outputs(images[:1])
    # Kernels of half precision differ by about a hundredth with the number of images.
    return _agree(together, again, 0.02) and _agree(together[:1], alone, 0.02)


class _Exit:
    """A module's return in a forward pass, and what has run until then."""

    def __init__(
        self, module: nn.Module, num_layers: int, output: Tensor, skipped: dict[nn.Module, list[tuple[int, ...]]]
    ):
        self.module = module
        self.num_layers = num_layers
        self.output_shape = tuple(output.shape)
        #: Outermost modules that have returned before, with the shape that each call returned, per image.
        self.skipped = skipped


def _exits(model: nn.Module, layers: LayerMap, images: Tensor) -> list[_Exit]:
    """Returns of modules that run once in a pass and give one tensor, a row or more for each image, in order."""
    num_images = len(images)
    layer_modules = {layer.module for layer in layers}
    in_layers = {child for layer in layer_modules for child in layer.modules() if child is not layer}
    exits: list[_Exit] = []
    calls: defaultdict[nn.Module, int] = defaultdict(int)
    open_calls: list[list[tuple[nn.Module, Any]]] = [[]]
    num_layers = 0

    def enter(module: nn.Module, args: Any) -> None:
        open_calls.append([])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal num_layers
        open_calls.pop()
        num_layers += module in layer_modules
        calls[module] += 1
        done = [call for children in open_calls for call in children]
        open_calls[-1].append((module, output))
        if _is_per_image(output, num_images) and all(_is_per_image(result, num_images) for _, result in done):
            skipped: dict[nn.Module, list[tuple[int, ...]]] = {}
            for earlier, result in done:
                skipped.setdefault(earlier, []).append((len(result) // num_images, *result.shape[1:]))
            exits.append(_Exit(module, num_layers, output, skipped))

    seen = [module for module in model.modules() if module not in in_layers]
    handles = [module.register_forward_pre_hook(enter) for module in seen]
    handles += [module.register_forward_hook(leave) for module in seen]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [exit for exit in exits if calls[exit.module] == 1 and exit.output_shape[0] == num_images]


def _is_per_image(output: Any, num_images: int) -> bool:
    return isinstance(output, Tensor) and output.dim() > 0 and len(output) > 0 and len(output) % num_images == 0


def _is_whole(cut: Cut, model: nn.Module, layers: LayerMap, first: Tensor, second: Tensor) -> bool:
    """Whether the outputs at the cut say all that the layers behind it need: with those of one batch kept, another
    one's images make no difference to what any of them sees."""
    behind = [layer.module for layer in layers[cut.num_layers :]]
    expected = _seen_by(behind, model, first)
    otherwise = _seen_by(behind, model, second)
    # An initialisation of zeros hides everything behind it.
    if not expected or _agree(expected[0], otherwise[0]):
        return False
    try:
        with cut.behind(cut.outputs(first)):
            seen = _seen_by(behind, model, second)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # something between the modules does not take what stands in for an output
    return len(seen) == len(expected) and all(map(_agree, seen, expected))


def _seen_by(modules: Sequence[nn.Module], model: nn.Module, images: Tensor) -> list[Tensor]:
    """Tensors that ``modules`` are given in a pass, in order, and what the network gives."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend(value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
    try:
        result = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [*seen, result] if isinstance(result, Tensor) else seen


def _agree(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    """Equal but for rounding; ``tolerance`` is relative to the largest value, for a network as it is initialised may
    hand on next to nothing."""
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


def _standing_in(forward: Callable[..., Any], shapes: Sequence[tuple[int, ...]], outputs: Tensor) -> Callable[..., Any]:
    """In the place of a module's calls before the cut, zeros of the shapes that they give; later calls run."""
    left = list(reversed(shapes))

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return forward(*args, **kwargs)
        rows, *shape = left.pop()
        return outputs.new_zeros(()).expand(rows * len(outputs), *shape)

    return stand_in


class _Reached(Exception):  # noqa: N818  it is no error: a forward pass ends at the cut
    def __init__(self, output: Tensor):
        self.output = output


def _leave(module: nn.Module, args: Any, output: Tensor) -> None:
    raise _Reached(output)
