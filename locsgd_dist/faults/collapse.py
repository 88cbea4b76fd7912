"""A network that has collapsed trains on for days and learns nothing: the run notices, says so, and may end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from locsgd_dist.faults.config import FaultConfig

Kind = Literal["loss", "rank", "norm"]

#: Share of chance by which the loss must have fallen before it can be said to have come back.
_LEARNED = 0.2
#: Effective rank at the hand-over below which there is none to lose.
_LEAST_RANK = 1.5
_OF_LAYERS = {
    "rank": "localized weights have collapsed into one direction, effective rank since their hand-over",
    "norm": "localized weights are gone or have exploded, norm since their hand-over",
}
_NAMED_LAYERS = 3


class CollapsedError(Exception):
    """The network has collapsed, the run has saved itself, and ``faults.on_collapse=stop``."""


@dataclass(frozen=True)
class Collapse:
    """What was found at the end of an epoch.

    Attributes:
        kind: what has collapsed.
        layers: localized layers that it was found in, from 0; none for the loss.
        message: one line.
    """

    kind: Kind
    layers: tuple[int, ...]
    message: str


@dataclass(frozen=True)
class _HandOver:
    """Layers that one shift gave to the localized region.

    Attributes:
        start: the first of them.
        before: what each was like then, by what is watched (``rank``, ``norm``).
    """

    start: int
    before: dict[str, list[float]]

    @property
    def stop(self) -> int:
        return self.start + len(self.before["norm"])


class CollapseWatch:
    """Compares each epoch with the best that the run has been, and localized layers with what was handed over.

        watch.hand_over(boundary, norms, ranks)                  # before the first epoch
        for collapse in watch.observe(...): ...                  # at each epoch's end

    All numbers must be the same on all ranks. Each kind of collapse is found once, in layers once per shift that handed
    them over: what lasts is not news.

    Args:
        config: the ``faults`` section.
        layer_names: of the network, in execution order.
        num_classes: a uniform guess among them is chance.

    Attributes:
        ends_run: whether the run is to end here: something was found under ``faults.on_collapse=stop``, and the run has
            not been let go on with warn since.
    """

    def __init__(self, config: FaultConfig, layer_names: Sequence[str], num_classes: int):
        self._config = config
        self._names = list(layer_names)
        self._chance = math.log(num_classes)
        self._lowest_loss = math.inf
        self._epochs_back = 0
        self._handed_over: list[_HandOver] = []
        #: Kinds that have been found, with the first layer of the shift; -1 for the loss.
        self._found: set[tuple[str, int]] = set()
        self._messages: list[str] = []
        self.ends_run = False

    @property
    def verdict(self) -> str:
        """All that has been found, in one line."""
        return "; ".join(self._messages)

    def hand_over(self, boundary: int, norms: Sequence[float], ranks: Sequence[float]) -> None:
        """Layers below ``boundary`` learn locally from here on.

        Args:
            norms, ranks: Frobenius norm and effective rank of every layer's weight now.
        """
        start = self._handed_over[-1].stop if self._handed_over else 0
        if boundary > start:
            before = {"norm": list(norms[start:boundary]), "rank": list(ranks[start:boundary])}
            self._handed_over.append(_HandOver(start, before))

    def observe(
        self, epoch: int, *, loss: float | None, norms: Sequence[float], ranks: Sequence[float]
    ) -> list[Collapse]:
        """What is found for the first time at the end of ``epoch`` (from 0).

        Args:
            loss: mean cross-entropy of training; None for an epoch without a step.
            norms, ranks: Frobenius norm and effective rank of every layer's weight.
        """
        found = [
            *self._of_loss(loss),
            *self._of_layers("rank", ranks, self._rank_is_gone),
            *self._of_layers("norm", norms, self._norm_is_gone),
        ]
        self._messages += [f"epoch {epoch + 1}: {collapse.message}" for collapse in found]
        self.ends_run |= self._stops and bool(found)
        return found

    @property
    def _stops(self) -> bool:
        return self._config.on_collapse == "stop"

    def _of_loss(self, loss: float | None) -> Iterator[Collapse]:
        if loss is None:
            return
        gained, left = self._chance - self._lowest_loss, self._chance - loss
        is_back = 0 < gained >= _LEARNED * self._chance and left <= self._config.collapse_loss * gained
        self._epochs_back = self._epochs_back + 1 if is_back else 0
        if self._epochs_back >= self._config.collapse_epochs and ("loss", -1) not in self._found:
            self._found.add(("loss", -1))
            yield Collapse(
                "loss",
                (),
                f"training loss is back at {loss:.3g}, near chance ({self._chance:.3g}), after {self._lowest_loss:.3g}",
            )
        self._lowest_loss = min(self._lowest_loss, loss)

    def _of_layers(
        self, kind: Kind, values: Sequence[float], is_gone: Callable[[float, float], bool]
    ) -> Iterator[Collapse]:
        collapsed: dict[int, float] = {}
        for group in self._handed_over:
            layers = enumerate(group.before[kind], group.start)
            gone = {layer: before for layer, before in layers if is_gone(before, values[layer])}
            if gone and (kind, group.start) not in self._found:
                self._found.add((kind, group.start))
                collapsed |= gone
        if collapsed:
            shown = [f"{self._names[layer]} {before:.3g} → {values[layer]:.3g}" for layer, before in collapsed.items()]
            if len(shown) > _NAMED_LAYERS:
                shown[_NAMED_LAYERS:] = [f"{len(shown) - _NAMED_LAYERS} more"]
            yield Collapse(kind, tuple(collapsed), f"{_OF_LAYERS[kind]}: {', '.join(shown)}")

    # Written so that a number that is not one is a collapse too.
    def _rank_is_gone(self, before: float, now: float) -> bool:
        return before >= _LEAST_RANK and not now - 1 > self._config.collapse_rank * (before - 1)

    def _norm_is_gone(self, before: float, now: float) -> bool:
        factor = self._config.collapse_norm
        return before > 0 and not before / factor < now < before * factor

    def state_dict(self) -> dict[str, Any]:
        return {
            "lowest_loss": self._lowest_loss,
            "epochs_back": self._epochs_back,
            "handed_over": [(group.start, dict(group.before)) for group in self._handed_over],
            "found": sorted(self._found),
            "messages": list(self._messages),
            "ends_run": self.ends_run,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lowest_loss, self._epochs_back = state["lowest_loss"], state["epochs_back"]
        self._handed_over = [_HandOver(start, dict(before)) for start, before in state["handed_over"]]
        self._found = {(kind, start) for kind, start in state["found"]}
        self._messages = list(state["messages"])
        self.ends_run = self._stops and state.get("ends_run", False)
