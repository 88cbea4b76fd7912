"""Time by parts of a program: each part's own, without that of the parts it calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.step import TrainStep


class Stopwatch:
    """Adds up the time that chosen calls take themselves, the device waited for at both ends of each.

    Waiting forbids overlap: on a GPU the sum may exceed what the whole takes unwatched.

    Args:
        device: what the calls work on.
        clock: ``cpu``: time spent on cores, which other work on the machine disturbs least, of work on the CPU alone;
            ``wall``: what a clock on the wall shows.

    Attributes:
        seconds: of each part so far.
    """

    def __init__(self, device: torch.device, clock: str = "cpu"):
        self.seconds: dict[str, float] = {}
        self._device = device
        self._now = time.process_time if clock == "cpu" and device.type == "cpu" else time.perf_counter
        self._open: list[str] = []
        self._in_whole = False
        self._since = 0.0
        self._watched: list[tuple[Any, str, Any]] = []

    def watch(self, owner: Any, name: str, part: str, *, whole: bool = False) -> None:
        """Counts calls of ``owner``'s method ``name`` from here on, until :meth:`release`, for ``part``."""
        self._watched.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, self.around(part, getattr(owner, name), whole=whole))

    def watch_step(self, step: TrainStep, learner: LocalizedLearner) -> None:
        """Counts the parts of a training step: forward, update, backward, optimizer."""
        self.watch(learner, "_gather", "update")
        self.watch(learner, "apply", "update")
        self.watch(step.model, "forward", "forward")
        self.watch(step._optimizer, "step", "optimizer")
        # The class's own: the loss is a tensor of each step's own.
        self.watch(Tensor, "backward", "backward")

    def release(self) -> None:
        """Everything is as it was before :meth:`watch`."""
        while self._watched:
            owner, name, before = self._watched.pop()
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def around(self, part: str, call: Callable[..., Any], *, whole: bool = False) -> Callable[..., Any]:
        """``call``, counted for ``part``; with what it calls if ``whole``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._in_whole:
                return call(*args, **kwargs)
            self._turn()
            self._open.append(part)
            self._in_whole = whole
            try:
                return call(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()
                self._in_whole = False

        return timed

    def _turn(self) -> None:
        """Gives the time since the last turn to the innermost open part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
