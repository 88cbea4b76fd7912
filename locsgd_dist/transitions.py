"""What changes between epochs: layers handed over to localized learning, a network cut smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from locsgd_dist.baselines import Baseline
from locsgd_dist.distributed import KeptOutputs, RegionDDP, Replicas
from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.models import network_size
from locsgd_dist.optimization import RegionOptimizer
from locsgd_dist.progress import Progress
from locsgd_dist.recording import Recorder


class Transitions:
    """Carries out what has been decided, and lets everything follow that speaks of the SGD region or its weights.

    All ranks call every method at the same time: wrapping anew is a collective.

    Attributes:
        size: the network's present one, as it is recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        learner: LocalizedLearner,
        baseline: Baseline,
        optimizer: RegionOptimizer,
        region: RegionDDP,
        replicas: Replicas,
        kept: KeptOutputs,
        recorder: Recorder,
        progress: Progress,
        is_compiled: bool,
    ):
        self._model = model
        self._example_input = example_input
        self._learner = learner
        self._baseline = baseline
        self._optimizer = optimizer
        self._region = region
        self._replicas = replicas
        self._kept = kept
        self._recorder = recorder
        self._progress = progress
        self._is_compiled = is_compiled
        self.size: dict[str, Any] = {}

    def measure(self) -> None:
        """Takes :attr:`size` anew."""
        self.size = network_size(self._model, self._example_input)

    def move_boundary(self, boundary: int) -> None:
        """Hands layers over to localized learning."""
        before = self._learner.boundary
        if boundary == before:
            return
        self._optimizer.release(self._learner.advance(boundary))
        self._region.refresh()
        self._replicas.refresh()
        self._compile_anew()
        where = {"epoch": max(0, self._progress.epoch - 1), "samples_seen": self._progress.samples_seen}
        self._recorder.event("shift", **where, boundary_from=before, boundary_to=boundary)
        held = [layer.name for layer in self._learner.layers[before:boundary] if not layer.updatable]
        if held and self._learner.rule.updates:
            message = f"frozen in the localized region, since no localized rule applies: {', '.join(held)}"
            self._recorder.event("frozen_layers", **where, message=message)
        self.keep_outputs(where["epoch"])

    def keep_outputs(self, epoch: int) -> None:
        """Lets what is kept of layers at rest follow the boundary, and says what has become of it, as of ``epoch``."""
        if (message := self._kept.refresh(self._progress.epoch)) is not None:
            self._recorder.event("outputs", epoch=epoch, samples_seen=self._progress.samples_seen, message=message)

    def prune(self) -> None:
        """Lets the baseline cut the network at an epoch's end, if it is one that does."""
        surgery = self._baseline.end_epoch(self._progress.epoch)
        if surgery is None:
            return
        self._optimizer.cut(surgery.cut)
        self._region.refresh()
        self._compile_anew()
        before = self.size
        self.measure()
        self._recorder.event(
            "prune",
            epoch=self._progress.epoch,
            samples_seen=self._progress.samples_seen,
            removed_channels=surgery.removed_channels,
            num_parameters_from=before["num_parameters"],
            num_parameters_to=self.size["num_parameters"],
            forward_macs_from=before["forward_macs"],
            forward_macs_to=self.size["forward_macs"],
        )

    def _compile_anew(self) -> None:
        """Past its limit of recompilations dynamo silently stops compiling; what has changed invalidates all anyway."""
        if self._is_compiled:
            torch._dynamo.reset()
