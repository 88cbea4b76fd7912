"""Numbers as people read them, the same on the console, in reports and in the planner's tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "–"
"""Stands where nothing was recorded."""

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_EVENT_HEADER = ("type", "epoch", "samples_seen", "time")


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; a bool is a flag, not a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_bytes(num_bytes: float | None) -> str:
    """Binary units, three significant digits: 1536 → `1.50 KiB`."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return MISSING
    value, unit = float(num_bytes), 0
    while abs(value) >= 1023.5 and unit < len(BYTE_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {BYTE_UNITS[unit]}"


def format_count(value: float | None) -> str:
    """Thousands separated: 12345 → `12,345`; small rates keep three significant digits: 3.14159 → `3.14`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def format_percent(fraction: float | None) -> str:
    """A fraction of one as percent: 0.9612 → `96.12 %`."""
    return MISSING if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.2f} %"


def format_duration(seconds: float | None) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def describe_event(event: Mapping[str, Any]) -> str:
    """One phrase for an event of events.jsonl; unknown types and fields are spelled out as `name=value`."""
    fields = {key: value for key, value in event.items() if key not in _EVENT_HEADER}
    match event.get("type"):
        case "shift":
            phrase = _change("boundary", fields, "boundary_from", "boundary_to")
        case "batch":
            phrase = _change("batch per GPU", fields, "per_gpu_from", "per_gpu_to")
        case "oom":
            phrase = "out of memory"
        case "collapse":
            phrase = str(fields.get("message", ""))
            fields = {}
        case _:
            phrase = ""
    message = str(fields.pop("message", "") or "")
    rest = ", ".join(f"{key}={value}" for key, value in fields.items() if value is not None)
    return ": ".join(part for part in (phrase, message, rest) if part)


def _change(what: str, fields: dict[str, Any], before: str, after: str) -> str:
    return f"{what} {fields.pop(before, MISSING)} → {fields.pop(after, MISSING)}"
