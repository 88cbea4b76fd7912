"""What an epoch changes in those after it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from locsgd_dist.config import Config
from locsgd_dist.faults import CollapseWatch
from locsgd_dist.localized import EpochDiagnostics, LayerMap, Selector, WeakSupervision, criterion_values, make_selector
from locsgd_dist.localized.selection import ScheduledSelector
from locsgd_dist.recording import Recorder


class Decisions:
    """The boundary, the sign of localized updates, and whether the run has collapsed, from the records of its epochs.

    Records are the same on all ranks, which therefore decide alike.

    Attributes:
        selector: places the boundary.
        supervision: gives the sign.
        collapse: compares each epoch with the best that the run has been.

    Raises:
        ValueError: as :func:`make_selector`.
    """

    def __init__(self, config: Config, layers: LayerMap, *, num_classes: int):
        self.selector = _make_selector(config, layers)
        self.supervision = WeakSupervision()
        self.collapse = CollapseWatch(config.faults, [layer.name for layer in layers], num_classes)
        self._config = config

    @property
    def boundary(self) -> int:
        """The boundary in force, in layers."""
        return self.selector.boundary

    @property
    def sign(self) -> float:
        """That of localized updates: +1 or -1."""
        return self.supervision.sign

    def begin(self, weights: EpochDiagnostics) -> None:
        """Before the first epoch of a process that starts with more localized layers than its network had; ``weights``
        are those of all layers."""
        self.collapse.hand_over(self.boundary, weights.norm, weights.effective_rank)

    def observe(self, metrics: dict[str, Any]) -> None:
        """Takes in an epoch's record and completes it by ``boundary_next``."""
        localized, selection = self._config.localized, self._config.selection
        if localized.weak_supervision == "alignment":
            self.supervision.follow(metrics["layer_alignment"])
        elif localized.weak_supervision:
            self.supervision.observe(metrics["train_loss"])
        values = criterion_values(
            selection.criterion,
            update_norms=metrics["layer_update_norm"],
            norms=metrics["layer_norm"],
            sum_of_lr=metrics["sum_of_lr"],
            loss=metrics["train_loss"],
        )
        if metrics["epoch"] + 1 < self._config.train.epochs:
            self.selector.observe(metrics["epoch"], values)
        metrics["boundary_next"] = self.boundary

    def look_for_collapse(self, metrics: dict[str, Any], recorder: Recorder) -> None:
        """Records as events what is found for the first time in a complete record."""
        norms, ranks = metrics["layer_norm"], metrics["layer_effective_rank"]
        # Where every step was skipped there is no loss.
        loss = metrics["train_loss"] if metrics["skipped_steps"] < metrics["num_steps"] else None
        where = {"epoch": metrics["epoch"], "samples_seen": metrics["samples_seen"]}
        for collapse in self.collapse.observe(metrics["epoch"], loss=loss, norms=norms, ranks=ranks):
            recorder.event("collapse", **where, **asdict(collapse))
        self.collapse.hand_over(metrics["boundary_next"], norms, ranks)


def _make_selector(config: Config, layers: LayerMap) -> Selector:
    if config.localized.rule == "none":
        return ScheduledSelector([0])
    return make_selector(
        config.selection, num_layers=len(layers), block_size=layers.block_size, epochs=config.train.epochs
    )
