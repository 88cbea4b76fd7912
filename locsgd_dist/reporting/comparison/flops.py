"""Training operations of a run: from the boundary that was recorded for each epoch, not from a plan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from locsgd_dist.planner.macs import NetworkMacs, network_macs
from locsgd_dist.recording.directory import Record
from locsgd_dist.reporting.comparison.loading import Run
from locsgd_dist.reporting.comparison.traits import prunes, shape_of, variant_settings
from locsgd_dist.reporting.run_data import Array

FLOPS_PER_MAC = 2
_DECIDES_MACS = re.compile(r"model\..*|data\.(name|root|image_size)|localized\.rule(_options)?|stochastic_depth\..*")


class FlopCounter:
    """Counts runs; networks are built on ``meta`` tensors, once for runs that share them.

    Counted are the convolutions and linear maps of training: forward passes, backward passes of the SGD region,
    localized updates. Not counted: normalisations and activations, the optimizer, evaluations.
    """

    def __init__(self, runs: Iterable[Run]):
        self._macs: dict[str, dict[int, NetworkMacs] | None] = {}
        together: dict[str, list[Run]] = {}
        for run in runs:
            together.setdefault(_network_key(run), []).append(run)
        for key, sharing in together.items():
            boundaries = {0} | {
                int(number)
                for run in sharing
                for key in ("boundary", "num_kept_layers")
                for number in run.data.series(key)
                if np.isfinite(number)
            }
            self._macs[key] = _count(sharing[0], boundaries)

    def per_epoch(self, run: Run) -> Array:
        """[E] floating-point operations of each epoch, all ranks together; NaN where the network cannot be counted."""
        macs = self._macs.get(_network_key(run))
        if macs is None:
            return np.full(len(run.data.epochs), np.nan)
        per_image = [
            _macs_per_image(run, metrics, macs, images)
            for metrics, images in zip(run.data.metrics, run.images, strict=True)
        ]
        return FLOPS_PER_MAC * np.asarray(per_image) * run.images


def _network_key(run: Run) -> str:
    settings: dict[str, Any] = variant_settings(run.config)
    return json.dumps([settings[key] for key in settings if _DECIDES_MACS.fullmatch(key)], default=str)


def _count(run: Run, boundaries: set[int]) -> dict[int, NetworkMacs] | None:
    shape = shape_of(run.config)
    if shape is None:
        return None
    try:
        return network_macs(run.config, shape, boundaries)
    except (ValueError, ImportError, RuntimeError, NotImplementedError, TypeError):
        return None  # a network of one's own that is not here, or that needs values to run: no figure


def _macs_per_image(run: Run, metrics: Record, macs: dict[int, NetworkMacs], images: float) -> float:
    """Multiply-adds per training image in one epoch of so many."""
    localized, replicas = run.config.localized, run.config.replicas
    boundary = metrics.get("boundary")
    if boundary not in macs:
        return np.nan
    at, whole = macs[boundary], macs[0]
    # With sharded replicas each layer is updated by one rank, from its own share of the batch.
    ranks = (metrics.get("world_size") or 1) if replicas.mode == "sharded" else 1
    batch = metrics.get("per_gpu_batch") or run.config.batch.per_gpu
    update = (localized.batch_fraction * at.localized + at.localized_per_batch / batch) / ranks
    shares = StepShares.of(run, metrics)
    per_image: float = at.forward + at.backward + shares.update * update
    if kept := metrics.get("num_kept_samples"):
        # Of these images the first layers did not run: what they give was kept.
        per_image -= kept / images * macs[metrics["num_kept_layers"]].prefix
    through_all = whole.backward - at.backward + (at.prefix if localized.refresh_recompute else 0)
    if shares.refresh:
        # Of a refresh step's batch a fraction backpropagates, and only the rest of it computes the localized update.
        in_both = shares.refresh * shares.update if localized.refresh_fraction < 1 else 0
        extra = shares.refresh * through_all + (shares.alignment - in_both) * update
        per_image += localized.refresh_fraction * extra
    elif shares.alignment:
        # Steps that are measured fall upon those that compute an update anyway as often as upon any.
        per_image += shares.alignment * (through_all + (1 - shares.update) * update)
    if prunes(run.config):  # the record does not say which layers have shrunk: taken as all alike
        forward = metrics.get("forward_macs")
        per_image *= forward / whole.forward if isinstance(forward, (int, float)) else np.nan
    return per_image


@dataclass(frozen=True)
class StepShares:
    """Shares of an epoch's steps: as the record counts them, else as the configuration has them.

    Attributes:
        refresh: the localized region learnt by its true gradient too.
        update: a localized update was computed.
        alignment: it was compared with the gradient.
    """

    refresh: float
    update: float
    alignment: float

    @classmethod
    def of(cls, run: Run, metrics: Record) -> StepShares:
        localized = run.config.localized
        if not metrics.get("boundary"):
            return cls(0.0, 0.0, 0.0)

        def share(kind: str, otherwise: float) -> float:
            count, steps = metrics.get(f"num_{kind}_steps"), metrics.get("num_steps")
            return count / steps if steps and count is not None else otherwise

        refresh = share("refresh", _one_in(localized.refresh_every))
        without_update = refresh if localized.refresh_fraction == 1 else 0.0
        measurable = refresh if localized.refresh_every else 1.0
        return cls(
            refresh,
            share("update", (1 - without_update) / localized.update_every),
            share("alignment", measurable * _one_in(localized.alignment_every)),
        )


def _one_in(every: int) -> float:
    return 1 / every if every else 0.0
