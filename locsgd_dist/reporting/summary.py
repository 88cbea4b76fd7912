"""The report's tables: the headline, the settings that matter, epochs, layers and events, ready for the template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from locsgd_dist.formatting import (
    MISSING,
    describe_event,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    is_number,
)
from locsgd_dist.reporting.run_data import RunData, finite, first_and_last


@dataclass(frozen=True)
class Tile:
    """A number of the headline, what it is, and what it is to be read against."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; columns without any value are left out."""

    headings: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, headings: list[str], rows: list[list[str]]) -> Table:
        used = [i for i in range(len(headings)) if any(row[i] not in ("", MISSING) for row in rows)]
        return cls([headings[i] for i in used], [[row[i] for i in used] for row in rows])


def headline(run: RunData) -> list[Tile]:
    """What one asks first. Numbers that were not recorded have no tile."""
    tiles = [
        _accuracy_tile(run),
        _time_tile(run),
        _range_tile(run, "Images per second", "images_per_second", format_count),
        _range_tile(run, "Footprint", "footprint_bytes", format_bytes),
        _traffic_tile(run),
        _range_tile(run, "Batch per GPU", "per_gpu_batch", format_count),
    ]
    return [tile for tile in tiles if tile is not None]


def _accuracy_tile(run: RunData) -> Tile | None:
    values = finite(run.series("val_top1"))
    if not values.size:
        return None
    note = f"last {format_percent(values[-1])}"
    averaged = finite(run.series("ema_val_top1"))
    if averaged.size:
        note += f"; EMA {format_percent(averaged.max())}"
    return Tile("Best validation top-1", format_percent(values.max()), note)


def _time_tile(run: RunData) -> Tile | None:
    seconds = finite(run.series("seconds"))
    if not seconds.size:
        return None
    return Tile("Time", format_duration(seconds.sum()), f"{format_duration(seconds[-1])} the last epoch")


def _range_tile(run: RunData, name: str, key: str, text: Any) -> Tile | None:
    ends = first_and_last(run.series(key))
    return Tile(name, text(ends[1]), f"last epoch; first {text(ends[0])}") if ends else None


def _traffic_tile(run: RunData) -> Tile | None:
    exchanged = finite(run.exchanged_bytes)
    if not exchanged.size:
        return None
    total = f"{format_bytes(exchanged.sum())} per rank"
    if run.share_of_plain_ddp is None:
        return Tile("Gradients and replicas", format_bytes(exchanged.sum()), "per rank")
    return Tile("Bytes vs plain DDP", format_percent(run.share_of_plain_ddp), total)


_SETTINGS = {
    "Model": (("model", "name"), ("model", "width"), ("model", "weights")),
    "Data": (("data", "name"), ("data", "train_samples")),
    "Optimizer": (("optim", "name"), ("optim", "lr"), ("optim", "schedule")),
    "Localized rule": (("localized", "rule"), ("localized", "lr")),
    "Selection": (("selection", "kind"), ("selection", "alpha"), ("selection", "lmax"), ("selection", "tshift")),
    "Replicas": (("replicas", "mode"), ("replicas", "every")),
    "Batch": (("batch", "per_gpu"), ("batch", "policy")),
    "Training": (("train", "precision"), ("train", "seed"), ("train", "device")),
}
"""Rows of the summary: the first setting by its value alone, the others by name too."""


def summary(run: RunData) -> list[tuple[str, str]]:
    """(what, value) pairs: settings from the configuration, then what the run came to."""
    rows = []
    for name, ((section, key), *others) in _SETTINGS.items():
        parts = [str(value)] if (value := run.setting(section, key)) is not None else []
        for section, key in others:
            if (value := run.setting(section, key)) is not None:
                parts.append(f"{key} {value}")
        rows.append((name, ", ".join(parts)))
    gradients, replicas, plain = (
        run.series(key) for key in ("grad_all_reduce_bytes", "replica_sync_bytes", "plain_ddp_bytes")
    )
    checkpoints = [event for event in run.events if event.get("type") == "checkpoint"]
    boundary, num_layers = run.last("boundary"), run.last("num_layers")
    rows += [
        ("Ranks", _text(run.last("world_size"))),
        ("Epochs", progress(run)),
        ("Samples seen", _count(run.last("samples_seen"))),
        ("Boundary", "" if boundary is None else f"{boundary} of {_text(num_layers) or MISSING} layers"),
        ("Outputs kept", _kept(run)),
        ("Collapse", "; ".join(_collapses(run))),
        ("Checkpoints", f"{len(checkpoints)}, the last in epoch {checkpoints[-1].get('epoch')}" if checkpoints else ""),
        ("Footprint measured by", _text(run.last("footprint_source"))),
        ("Gradient bytes per rank", format_bytes(finite(gradients).sum()) if finite(gradients).size else ""),
        ("Replica bytes per rank", format_bytes(finite(replicas).sum()) if finite(replicas).size else ""),
        ("Plain DDP's bytes per rank", format_bytes(finite(plain).sum()) if finite(plain).size else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _kept(run: RunData) -> str:
    """What it has saved that outputs of layers at rest were kept."""
    samples, kept = run.last("samples_seen"), finite(run.series("num_kept_samples")).sum()
    if not kept or not is_number(samples):
        return ""
    used = {
        m["num_kept_layers"] for m in run.metrics if m.get("num_kept_samples") and is_number(m.get("num_kept_layers"))
    }
    layers = " to ".join(str(number) for number in sorted({min(used), max(used)})) if used else MISSING
    return f"the first {layers} layers did not run for {format_percent(kept / samples)} of the images"


def _collapses(run: RunData) -> list[str]:
    """What has collapsed, and in which epoch (from 0, as in the tables)."""
    found = [event for event in run.events if event.get("type") == "collapse"]
    return [f"epoch {_text(event.get('epoch')) or MISSING}: {describe_event(event)}" for event in found]


def progress(run: RunData) -> str:
    """`34 of 90 epochs`, or without `of 90` where the configuration does not say."""
    planned = run.setting("train", "epochs")
    return f"{len(run.metrics)} of {planned}" if is_number(planned) else str(len(run.metrics))


def epoch_table(run: RunData) -> Table:
    """One row per epoch: the figures' numbers to read off and to copy."""
    columns: list[tuple[str, str, Any]] = [
        ("Epoch", "epoch", _count),
        ("Boundary", "boundary", _count),
        ("Batch per GPU", "per_gpu_batch", _count),
        ("Ranks", "world_size", _count),
        ("lr", "lr", _short),
        ("Local lr", "local_lr", _short),
        ("Train loss", "train_loss", _short),
        ("Val loss", "val_loss", _short),
        ("Val top-1", "val_top1", format_percent),
        ("Seconds", "seconds", _short),
        ("img/s", "images_per_second", _count),
        ("Footprint", "footprint_bytes", format_bytes),
        ("Gradients", "grad_all_reduce_bytes", format_bytes),
        ("Replicas", "replica_sync_bytes", format_bytes),
    ]
    rows = [
        [text(metrics[key]) if is_number(metrics.get(key)) else MISSING for _, key, text in columns]
        for metrics in run.metrics
    ]
    return Table.of([heading for heading, _, _ in columns], rows)


def layer_table(run: RunData) -> Table:
    """One row per layer: how it learns now, its norm, effective rank and drift, first and last."""
    norm, rank, drift = (run.layer_matrix(key) for key in ("layer_norm", "layer_effective_rank", "layer_drift"))
    num_layers = max(len(norm), len(rank), len(drift))
    boundary = run.last("boundary")
    rows = []
    for layer in range(num_layers):
        name = run.layer_names[layer] if layer < len(run.layer_names) else MISSING
        mode = MISSING if not is_number(boundary) else "local" if layer < boundary else "SGD"
        ends = [first_and_last(matrix[layer]) if layer < len(matrix) else None for matrix in (norm, rank, drift)]
        cells = [f"{_short(end[0])} → {_short(end[1])}" if end else MISSING for end in ends]
        rows.append([str(layer), name, mode, *cells])
    return Table.of(["Layer", "Name", "Learns", "‖W‖", "Effective rank", "‖ΔW‖/‖W‖"], rows)


def event_table(run: RunData) -> Table:
    """Events in the order of recording, but for the many checkpoints; time counts from the first."""
    times = [event["time"] for event in run.events if is_number(event.get("time"))]
    rows = [
        [
            format_duration(event["time"] - min(times)) if is_number(event.get("time")) else MISSING,
            _text(event.get("epoch")) or MISSING,
            _count(event.get("samples_seen")) or MISSING,
            _text(event.get("type")) or MISSING,
            describe_event(event),
        ]
        for event in run.events
        if event.get("type") != "checkpoint"
    ]
    return Table.of(["Time", "Epoch", "Samples", "Event", ""], rows)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _count(value: Any) -> str:
    return format_count(value) if is_number(value) else _text(value)


def _short(value: float) -> str:
    return f"{value:.4g}"
