"""Heat maps over layers and epochs: what localized updates do to norms and to the rank of the weights.

The colour's opacity carries the value, so that "nothing happened" is the page itself, light or dark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from locsgd_dist.reporting import style
from locsgd_dist.reporting.drawing import Drawing, epoch_axis, epoch_edges
from locsgd_dist.reporting.run_data import Array, RunData, finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROWN, _SHRUNK = (0.85, 0.45, 0.16), (0.20, 0.48, 0.78)
"""Orange and blue that stand out on white and on near-black alike: a raster cannot follow the page's scheme."""


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_norm(run: RunData) -> Drawing | None:
    """Norm of each layer's weights relative to its first recorded epoch."""
    return _draw_change(run, "layer_norm", "‖W‖")


def draw_effective_rank(run: RunData) -> Drawing | None:
    """Effective rank of each layer's weights relative to its first recorded epoch."""
    return _draw_change(run, "layer_effective_rank", "Effective rank")


def draw_drift(run: RunData) -> Drawing | None:
    """How far each layer's weights move in an epoch, relative to their norm, on a logarithmic scale."""
    drift = run.layer_matrix("layer_drift")
    moved = drift[np.isfinite(drift) & (drift > 0)]
    if not moved.size:
        return None
    high = float(np.ceil(np.log10(moved.max())))
    low = min(max(float(np.floor(np.log10(moved.min()))), high - 4), high - 1)
    with np.errstate(divide="ignore"):
        exponent = np.clip(np.log10(drift), low, high)
    ticks = np.arange(low, high + 1)
    labels = [f"10{str(int(tick)).translate(_SUPERSCRIPTS)}" for tick in ticks]
    caption = (
        f"‖ΔW over the epoch‖ / ‖W‖ from {moved.min():.2g} to {moved.max():.2g}. Layers below the line learn locally."
    )
    return _heat_map(run, exponent, low, high, ticks, labels, diverging=False), caption


def draw_alignment(run: RunData) -> Drawing | None:
    """Cosine between each layer's localized steps and the descent direction, where it was measured."""
    cosines = run.layer_matrix("layer_alignment")
    known = finite(cosines.ravel())
    if not known.size:
        return None
    # Between random directions of n weights a cosine is about 1 / sqrt(n): a scale to 1 would show nothing.
    limit = next((bound for bound in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if np.abs(known).max() <= bound), 1.0)
    ticks = np.array([-limit, 0, limit])
    caption = (
        f"cos(ΔW, −∂loss/∂W) of the steps as taken, their sign included: {known.mean():+.2g} in the mean, "
        f"{known.min():+.2g} to {known.max():+.2g}. Above 0 a step leads downhill. Layers below the line learn locally."
    )
    labels = [f"{tick:+.2g}" if tick else "0" for tick in ticks]
    return _heat_map(run, cosines, -limit, limit, ticks, labels, diverging=True), caption


def _draw_change(run: RunData, key: str, name: str) -> Drawing | None:
    values = run.layer_matrix(key)
    if len(run.metrics) < 2 or not finite(values.ravel()).size:
        return None
    ratio = values / _first_recorded(values)[:, None]
    change = np.log2(np.where(ratio > 0, ratio, np.nan))
    if not finite(change.ravel()).size:
        return None
    limit = float(np.clip(np.ceil(np.nanmax(np.abs(change))), 1, 6))
    ticks = np.array([-limit, 0, limit])
    labels = [f"×{2.0**tick:.2g}" for tick in ticks]
    now = 2 ** change[:, -1]
    caption = f"{name} relative to the first epoch. "
    if finite(now).size:
        least, most = int(np.nanargmin(now)), int(np.nanargmax(now))
        caption += f"Now: ×{now[least]:.2g} in layer {least} to ×{now[most]:.2g} in layer {most}. "
    figure = _heat_map(run, change, -limit, limit, ticks, labels, diverging=True)
    return figure, caption + "Layers below the line learn locally."


def _first_recorded(values: Array) -> Array:
    """[L] each row's first finite value; NaN for a row without one."""
    recorded = np.isfinite(values)
    first = values[np.arange(len(values)), recorded.argmax(axis=1)]
    return np.where(recorded.any(axis=1) & (first > 0), first, np.nan)


def _heat_map(
    run: RunData, values: Array, low: float, high: float, ticks: Array, labels: list[str], *, diverging: bool
) -> Figure:
    """`values` [L, E] as an image, layer 0 at the bottom, with the boundary drawn over it and a scale at the right."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = style.new_figure()
    num_layers = len(values)
    extent = (run.epochs[0] - 0.5, run.epochs[-1] + 0.5, -0.5, num_layers - 0.5)
    # interpolation "none" puts one pixel a value into the SVG and leaves enlarging it to the browser
    axes.imshow(_rgba(values, low, high, diverging), extent=extent, aspect="auto", origin="lower", interpolation="none")
    boundary = run.series("boundary")
    if np.isfinite(boundary).any():
        axes.stairs(boundary - 0.5, epoch_edges(run), baseline=None, color=style.INK, linewidth=1.1)
    axes.set_ylim(extent[2:])
    epoch_axis(axes, run)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    style.name_axis(axes, "layer")
    axes.set_position((0.115, 0.155, 0.745, 0.745))
    scale = figure.add_axes((0.885, 0.155, 0.022, 0.745))
    ramp = np.linspace(low, high, 64)[:, None]
    scale.imshow(
        _rgba(ramp, low, high, diverging), extent=(0, 1, low, high), aspect="auto", origin="lower", interpolation="none"
    )
    scale.set(xticks=[], yticks=ticks, yticklabels=labels)
    scale.yaxis.tick_right()
    scale.grid(visible=False)
    scale.spines[:].set_visible(True)
    return figure


def _rgba(values: Array, low: float, high: float, diverging: bool) -> Array:
    """[L, E, 4] opacity grows with the distance from zero change (diverging), or from `low`."""
    strength = np.abs(values) / high if diverging else (values - low) / (high - low)
    grown = (values > 0) if diverging else np.ones(values.shape, dtype=bool)
    image = np.empty((*values.shape, 4))
    image[..., :3] = np.where(grown[..., None], _GROWN if diverging else _SHRUNK, _SHRUNK)
    image[..., 3] = np.nan_to_num(np.clip(strength, 0, 1))
    return image
