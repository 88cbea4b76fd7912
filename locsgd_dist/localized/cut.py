"""Where a network can be cut in two, so that what its first layers say of an image can be kept and used again.

Layers at rest give the same outputs for the same image in every epoch. A cut is a module whose output is all that the
layers behind it need to know of the image. Whether that is so is tried, not read off the network's structure.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locsgd_dist.localized.layers import LayerMap
from locsgd_dist.localized.recompute import replaced_forwards

#: Images of a trial, and of the pass that tells how outputs grow with their number.
_PROBES, _MORE_PROBES = 4, 6
_MOST_TRIALS = 200
_Shape = tuple[int, ...]


class Cut:
    """A network taken apart behind one of its modules; :func:`find_cut` finds one.

    Attributes:
        module: the last one before the cut.
        num_layers: layers before the cut: 0 ... num_layers - 1.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        num_layers: int,
        skipped: Sequence[tuple[nn.Module, _Shape]],
        *,
        fills: bool = False,
    ):
        self.module = module
        self.num_layers = num_layers
        self._model = model
        self._skipped: dict[nn.Module, list[_Shape]] = {}
        for earlier, shape in skipped:
            self._skipped.setdefault(earlier, []).append(shape)
        self._fills = fills

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """``[n, ...]``: what the layers before the cut make of ``images``; those behind it do not run."""
        handle = self.module.register_forward_hook(_leave)
        try:
            self._model(images)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError("the network did not come by the cut")

    @contextmanager
    def behind(self, outputs: Tensor, *, stand_in: float = 0.0) -> Iterator[None]:
        """Forward passes inside take ``outputs`` for what the layers before the cut say, and do not run those, whatever
        images of that number they are given.

        Args:
            stand_in: value of what modules before the cut are taken to give.
        """
        with replaced_forwards() as replace:
            for module, shapes in self._skipped.items():
                replace(module, _standing_in(module.forward, shapes, outputs, stand_in, self._fills))
            replace(self.module, lambda *args, **kwargs: outputs)
            yield


@torch.no_grad()
def find_cut(model: nn.Module, layers: LayerMap, boundary: int, images: Tensor) -> Cut | None:
    """The last cut that lies wholly before layer ``boundary`` and at which an image gets the same output each time,
    whatever images are beside it.

    It is tried with a few images, in some ten passes, and two hundred where many modules have to be tried, in the modes
    in which the network is; its buffers and the global random states stay as they were.

    Args:
        model: the network whose layers ``layers`` are.
        images: an example, ``[1, ...]``, for its shape, dtype and device.

    Returns:
        None where there is none: there is a way around every module, or the layers draw random numbers, normalise by
        the batch or move a buffer.
    """
    generator = torch.Generator().manual_seed(0)
    size = (_MORE_PROBES, *images.shape[1:])
    # Each of another brightness and contrast, so that a mean over the batch is none of theirs.
    scale = torch.arange(1, _MORE_PROBES + 1).view(-1, *(1 for _ in size[1:]))
    probes, others = (
        (scale * torch.randn(size, generator=generator) + scale * sign).to(images) for sign in (0.5, -0.5)
    )
    few = probes[:_PROBES]
    with _undisturbed(model, images.device):
        exits = _exits(model, layers, few, probes)
        candidates = [exit for exit in exits if 0 < exit.num_layers <= min(boundary, len(layers) - 1)]
        expected: dict[int, list[Tensor]] = {}
        for exit in candidates[: -_MOST_TRIALS - 1 : -1]:
            behind = [layer.module for layer in layers[exit.num_layers :]]
            if exit.num_layers not in expected:
                expected[exit.num_layers] = _seen_by(behind, model, few)
            parameters = list(layers.parameters(exit.num_layers).values())
            trial = _Trial(model, behind, parameters, few, others[:_PROBES], expected[exit.num_layers])
            for fills in (False, True):  # filled tensors cost memory, but take what is done to them in place
                cut = Cut(model, exit.module, exit.num_layers, exit.skipped, fills=fills)
                try:
                    if trial.is_whole(cut) and _is_repeatable(cut, model, few):
                        return cut
                except Exception:  # a network may raise anything where it is given what it does not expect
                    continue
                break
    return None


class _Exit:
    """A module's return in a forward pass, the layers that have run until then, and the outermost modules that have
    returned before, call by call: each with the shape that an image has in what it gave."""

    def __init__(self, module: nn.Module, num_layers: int, skipped: list[tuple[nn.Module, _Shape]]):
        self.module = module
        self.num_layers = num_layers
        self.skipped = skipped


def _exits(model: nn.Module, layers: LayerMap, few: Tensor, more: Tensor) -> list[_Exit]:
    """Returns of modules that run once in a pass and before which every module gives one tensor that grows with the
    number of images, in order."""
    with_few, with_more = _returns(model, layers, few), _returns(model, layers, more)
    calls = Counter(module for module, *_ in with_few)
    if [module for module, *_ in with_few] != [module for module, *_ in with_more]:
        return []

    def of_an_image(position: int) -> _Shape | None:
        shape, other = with_few[position][2], with_more[position][2]
        if not shape or not other or shape[1:] != other[1:] or shape[0] % len(few) or shape[0] == 0:
            return None
        rows = shape[0] // len(few)
        return (rows, *shape[1:]) if other[0] == rows * len(more) else None

    shapes = [of_an_image(position) for position in range(len(with_few))]
    exits: list[_Exit] = []
    for position, (module, num_layers, _, done) in enumerate(with_few):
        own, earlier = shapes[position], [(with_few[at][0], shapes[at]) for at in done]
        if own is not None and own[0] == 1 and calls[module] == 1 and all(shape is not None for _, shape in earlier):
            exits.append(_Exit(module, num_layers, [(before, shape) for before, shape in earlier if shape is not None]))
    return exits


def _returns(
    model: nn.Module, layers: LayerMap, images: Tensor
) -> list[tuple[nn.Module, int, _Shape | None, list[int]]]:
    """Of each module's return in a pass until one has drawn a random number: the module, the layers that have run, the
    shape of what it gave (None: not one tensor), and the positions of the outermost returns before it."""
    layer_modules = {layer.module for layer in layers}
    in_layers = {child for layer in layer_modules for child in layer.modules() if child is not layer}
    returns: list[tuple[nn.Module, int, _Shape | None, list[int]]] = []
    open_calls: list[list[int]] = [[]]
    num_layers, has_drawn = 0, False
    _seed(images.device)
    states = _random_states(images.device)

    def enter(module: nn.Module, args: Any) -> None:
        open_calls.append([])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal num_layers, has_drawn
        open_calls.pop()
        num_layers += module in layer_modules
        has_drawn = has_drawn or _random_states(images.device) != states
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        done = [position for children in open_calls for position in children]
        if not has_drawn:
            open_calls[-1].append(len(returns))
            returns.append((module, num_layers, shape, done))

    seen = [module for module in model.modules() if module not in in_layers]
    handles = [module.register_forward_pre_hook(enter) for module in seen]
    handles += [module.register_forward_hook(leave) for module in seen]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return returns


@dataclass(frozen=True)
class _Trial:
    """What the layers behind a place to cut see of an image, held against what they see when it is cut there.

    Attributes:
        behind: modules of these layers.
        parameters: of these layers.
        others: as many images as ``images``, other ones.
        expected: as :func:`_seen_by` has it of ``images``.
    """

    model: nn.Module
    behind: Sequence[nn.Module]
    parameters: Sequence[nn.Parameter]
    images: Tensor
    others: Tensor
    expected: Sequence[Tensor]

    def is_whole(self, cut: Cut) -> bool:
        """Whether the outputs at the cut are all that the layers behind it see of an image.

        In the first trial neither the images nor what stands in for outputs before the cut are numbers: what comes by
        another way shows, be it multiplied by a gate of zero that has yet to learn. The others show what takes no
        notice of that.
        """
        nothing = torch.full_like(self.images, torch.nan)
        trials = ((torch.nan, nothing), (0.0, self.images), (1e3, self.images))
        return all(self._sees_the_same(cut, stand_in, images) for stand_in, images in trials) and self._learns_alike(
            cut
        )

    def _sees_the_same(self, cut: Cut, stand_in: float, images: Tensor) -> bool:
        _seed(images.device)
        outputs = cut.outputs(self.images)
        cut.outputs(self.others)  # whatever the modules remember of a pass, it is not of these images
        _seed(images.device)
        with cut.behind(outputs, stand_in=stand_in):
            seen = _seen_by(self.behind, self.model, images, seeds=False)
        return len(seen) == len(self.expected) > 0 and all(map(_agree, seen, self.expected))

    def _learns_alike(self, cut: Cut) -> bool:
        """Whether gradients agree too: a part of the network that runs anew in the backward pass does so when nothing
        stands in any more."""
        parameters = [parameter for parameter in self.parameters if parameter.requires_grad]
        if not parameters:
            return True
        whole = self._gradients(parameters, nullcontext(), self.images)
        outputs = cut.outputs(self.images)
        kept = self._gradients(parameters, cut.behind(outputs, stand_in=torch.nan), self.images)
        # Some are nothing but rounding, such as those of biases before a norm.
        floor = 1e-3 * max((float(a.abs().max()) for a in whole if a is not None), default=0.0)
        return all(
            a is b is None if a is None or b is None else _agree(a, b, 0.02, floor)
            for a, b in zip(whole, kept, strict=True)
        )

    @torch.enable_grad()
    def _gradients(
        self, parameters: Sequence[nn.Parameter], mode: AbstractContextManager[None], images: Tensor
    ) -> tuple[Tensor | None, ...]:
        _seed(images.device)
        with mode:
            loss = self.model(images).float().square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True)


def _is_repeatable(cut: Cut, model: nn.Module, images: Tensor) -> bool:
    """Of a cut before anything draws a random number: that is for :func:`_returns` to see."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    together, again, alone = cut.outputs(images), cut.outputs(images), cut.outputs(images[:1])
    if not all(map(_is_same, buffers, model.buffers())):
        return False
    # Kernels differ with the number of images, in half precision by about a hundredth.
    tolerance = 0.005 if together.dtype.itemsize >= 4 else 0.02
    return _agree(together, again, 1e-5) and _agree(together[:1], alone, tolerance)


def _seen_by(modules: Sequence[nn.Module], model: nn.Module, images: Tensor, *, seeds: bool = True) -> list[Tensor]:
    """Tensors that ``modules`` are given in a pass, in order, and what the network gives."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend(value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
    try:
        if seeds:
            _seed(images.device)
        result = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [*seen, result] if isinstance(result, Tensor) else seen


def _agree(a: Tensor, b: Tensor, tolerance: float = 1e-3, floor: float = 0.0) -> bool:
    """Equal but for rounding, relative to the largest value, ``floor`` at least: a network as it is initialised may
    hand on next to nothing."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp_min(floor))


def _is_same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _standing_in(
    forward: Callable[..., Any], shapes: Sequence[_Shape], outputs: Tensor, value: float, fills: bool
) -> Callable[..., Any]:
    """In the place of a module's calls before the cut, tensors of the shapes that they give; later calls run."""
    left = list(reversed(shapes))

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return forward(*args, **kwargs)
        rows, *shape = left.pop()
        size = (rows * len(outputs), *shape)
        return outputs.new_full(size, value) if fills else outputs.new_full((), value).expand(size)

    return stand_in


class _Reached(Exception):  # noqa: N818  it is no error: a forward pass ends at the cut
    def __init__(self, output: Tensor):
        self.output = output


def _leave(module: nn.Module, args: Any, output: Tensor) -> None:
    raise _Reached(output)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever runs inside, buffers and random states are after it as they were before."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    own, numpys = random.getstate(), _numpy_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(own)
            if numpys is not None:
                sys.modules["numpy"].random.set_state(numpys)
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _seed(device: torch.device) -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.manual_seed(0)


def _random_states(device: torch.device) -> tuple[Any, ...]:
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return random.getstate(), repr(_numpy_state()), *(bytes(state.tolist()) for state in states)


def _numpy_state() -> Any:
    """Of numpy's own generator, from which a network may draw too; None where nobody has loaded numpy."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()
