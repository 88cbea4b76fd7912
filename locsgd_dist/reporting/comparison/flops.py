"""Training operations of a run: from the boundary that was recorded for each epoch, not from a plan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from locsgd_dist.planner.macs import NetworkMacs, network_macs
from locsgd_dist.recording.directory import Record
from locsgd_dist.reporting.comparison.loading import Run
from locsgd_dist.reporting.comparison.traits import prunes, shape_of, variant_settings
from locsgd_dist.reporting.run_data import Array

FLOPS_PER_MAC = 2
_DECIDES_MACS = re.compile(r"model\..*|data\.(name|root|image_size)|localized\.rule|stochastic_depth\..*")


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
            boundaries = {0} | {int(b) for run in sharing for b in run.data.series("boundary") if np.isfinite(b)}
            self._macs[key] = _count(sharing[0], boundaries)

    def per_epoch(self, run: Run) -> Array:
        """[E] floating-point operations of each epoch, all ranks together; NaN where the network cannot be counted."""
        macs = self._macs.get(_network_key(run))
        if macs is None:
            return np.full(len(run.data.epochs), np.nan)
        per_image = [_macs_per_image(run, metrics, macs) for metrics in run.data.metrics]
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


def _macs_per_image(run: Run, metrics: Record, macs: dict[int, NetworkMacs]) -> float:
    """Multiply-adds per training image in one epoch."""
    localized, replicas = run.config.localized, run.config.replicas
    boundary = metrics.get("boundary")
    if boundary not in macs:
        return np.nan
    at, whole = macs[boundary], macs[0]
    # With sharded replicas each layer is updated by one rank, from its own share of the batch.
    ranks = metrics.get("world_size") or 1
    share = localized.batch_fraction / (ranks if replicas.mode == "sharded" else 1)
    per_image: float = at.forward + at.backward + share * at.localized
    if refresh := refresh_share(run, metrics):
        again = at.prefix if localized.refresh_recompute else 0
        per_image += refresh * (whole.backward - at.backward + again - share * at.localized)
    if prunes(run.config):  # the record does not say which layers have shrunk: taken as all alike
        forward = metrics.get("forward_macs")
        per_image *= forward / whole.forward if isinstance(forward, (int, float)) else np.nan
    return per_image


def refresh_share(run: Run, metrics: Record) -> float:
    """Share of an epoch's steps in which the localized region learnt by its true gradient too."""
    every, steps = run.config.localized.refresh_every, metrics.get("num_steps")
    if not every or not metrics.get("boundary"):
        return 0.0
    count = metrics.get("num_refresh_steps")
    return count / steps if steps and count is not None else 1 / every
