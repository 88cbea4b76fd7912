"""Figures of how training goes: boundary, accuracy, loss, learning rates, update norm."""

from __future__ import annotations

import numpy as np

from locsgd_dist.formatting import format_percent, is_number
from locsgd_dist.reporting import style
from locsgd_dist.reporting.drawing import (
    DASHED,
    Drawing,
    curve,
    epoch_axis,
    from_zero,
    mark_shifts,
    steps,
)
from locsgd_dist.reporting.run_data import Array, RunData, finite, first_and_last


def draw_boundary(run: RunData) -> Drawing | None:
    """Boundary per epoch (the paper's figure 3): layers below it learn locally, the others by SGD."""
    from matplotlib.ticker import MaxNLocator

    boundary, num_layers = run.series("boundary"), run.series("num_layers")
    ends = first_and_last(boundary)
    if ends is None:
        return None
    figure, (axes,) = style.new_figure()
    total = finite(num_layers)[-1] if finite(num_layers).size else np.nanmax(boundary)
    steps(axes, run, boundary, style.TEAL, label="localized")
    axes.set_ylim(0, max(total, 1))
    lmax = run.setting("selection", "lmax")
    if is_number(lmax) and lmax < 1:
        axes.axhline(lmax * total, color=style.MUTED, linewidth=1, linestyle=DASHED, label=f"lmax {lmax:g}")
    style.name_axis(axes, f"boundary, of {total:g} layers")
    style.legend(axes)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    epoch_axis(axes, run)
    shifts = int((np.diff(finite(boundary)) > 0).sum())
    caption = f"{ends[0]:g} of {total:g} layers learn locally in the first epoch, {ends[1]:g} in the last"
    return figure, f"{caption}; {shifts} shift{'s' * (shifts != 1)}."


def draw_accuracy(run: RunData) -> Drawing | None:
    """Top-1 accuracy of training and validation."""
    curves = {
        "training": (run.series("train_top1"), style.MUTED),
        "validation": (run.series("val_top1"), style.BLUE),
        "validation, EMA": (run.series("ema_val_top1"), style.PURPLE),
    }
    if not any(finite(values).size for values, _ in curves.values()):
        return None
    figure, (axes,) = style.new_figure()
    for label, (values, color) in curves.items():
        curve(axes, run, 100 * values, color, label=label)
    caption = "Training accuracy only: nothing was validated."
    validation = curves["validation"][0]
    if finite(validation).size:
        best = int(np.nanargmax(validation))
        axes.plot(run.epochs[best], 100 * validation[best], marker="o", markersize=5, color=style.BLUE)
        caption = f"Validation: best {format_percent(validation[best])} in epoch {run.epochs[best]:g}, "
        caption += f"last {format_percent(finite(validation)[-1])}."
    style.name_axis(axes, "top-1, %")
    style.legend(axes)
    epoch_axis(axes, run)
    return figure, caption


def draw_loss(run: RunData) -> Drawing | None:
    """Training and validation loss."""
    train, val = run.series("train_loss"), run.series("val_loss")
    if not (finite(train).size or finite(val).size):
        return None
    figure, (axes,) = style.new_figure()
    curve(axes, run, train, style.MUTED, label="training")
    curve(axes, run, val, style.BLUE, label="validation")
    style.name_axis(axes, "loss")
    style.legend(axes)
    epoch_axis(axes, run)
    return figure, _from_to({"Training": train, "validation": val})


def draw_learning_rates(run: RunData) -> Drawing | None:
    """Learning rates of the SGD region and of the localized updates, and the epochs of negative sign."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rate, local = run.series("lr"), run.series("local_lr")
    values = finite(np.concatenate([rate, local]))
    if not values.size:
        return None
    figure, (axes,) = style.new_figure()
    positive = values[values > 0]
    span = min(positive.max() / positive.min(), 1e4) if positive.size else 1.0
    if span > 20:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if span > 300 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    curve(axes, run, rate, style.BLUE, label="SGD")
    curve(axes, run, local, style.TEAL, label="localized")
    if span == 1e4:  # the last steps of a cosine may be any fraction of the first
        axes.set_ylim(bottom=positive.max() / span)
    negative = run.epochs[run.series("sign") < 0]
    if negative.size:
        axes.plot(
            negative,
            np.full(negative.size, 0.03),
            transform=axes.get_xaxis_transform(),
            marker="v",
            markersize=4.5,
            linestyle="none",
            color=style.RED,
            label="sign −1",
        )
    style.name_axis(axes, "learning rate")
    style.legend(axes)
    epoch_axis(axes, run)
    caption = _from_to({"SGD": rate, "localized": local})
    if negative.size:
        caption += f" Sign of localized updates −1 in {negative.size} of {len(run.metrics)} epochs."
    return figure, caption


def draw_update_norm(run: RunData) -> Drawing | None:
    """The transition layer's update norm, from which dynamic selection takes its decision."""
    norm, per_rate = run.series("transition_update_norm"), run.series("transition_update_norm_per_lr")
    ends = first_and_last(norm)
    if ends is None:
        return None
    both = bool(finite(per_rate).size)
    figure, panels = style.new_figure((1, 1) if both else (1,))
    names = ("‖ΔW‖ of the transition layer", "‖ΔW‖ / Σ learning rate")
    for axes, values, name in zip(panels, (norm, per_rate), names, strict=False):
        curve(axes, run, values, style.BLUE)
        from_zero(axes, values)
        style.name_axis(axes, name)
        mark_shifts(axes, run)
    epoch_axis(panels[-1], run)
    caption = f"{ends[0]:.3g} in the first epoch, {ends[1]:.3g} in the last."
    return figure, f"{caption} Green ticks: the boundary shifts, and another layer is measured."


def _from_to(curves: dict[str, Array]) -> str:
    """`Training 2.3 → 0.21, validation 1.9 → 0.4.`"""
    ends = {name: first_and_last(values) for name, values in curves.items()}
    return ", ".join(f"{name} {pair[0]:.3g} → {pair[1]:.3g}" for name, pair in ends.items() if pair) + "."
