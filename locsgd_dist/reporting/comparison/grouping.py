"""Runs into variants (seeds of one configuration), variants into benchmarks (what may be compared with each other)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locsgd_dist.reporting.comparison.loading import LeftOut, Run
from locsgd_dist.reporting.comparison.traits import (
    SCHEDULE_LENGTH,
    Traits,
    benchmark_settings,
    differing,
    schedule_settings,
    variant_settings,
)

_SEED_SUFFIX = re.compile(r"[-_.]?(seed|s)?[-_.]?$", re.IGNORECASE)
_BASELINE_NAMES = ("sgd", "baseline")


@dataclass(frozen=True, eq=False)
class Variant:
    """Runs that differ in their seed alone.

    Attributes:
        name: unique in the comparison.
        runs: by seed, one each.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def short_name(self) -> str:
        """Without what was put before it to tell it from others of the same name."""
        return self.name.rpartition("/")[2]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def traits(self) -> Traits:
        return self.first.traits

    @property
    def epochs(self) -> int:
        """Of the longest run; seeds differ where a schedule was matched to another run's cost."""
        return max(run.config.train.epochs for run in self.runs)

    @property
    def epochs_text(self) -> str:
        """``18``, or ``17–18``."""
        lengths = sorted({run.config.train.epochs for run in self.runs})
        return "–".join(str(length) for length in dict.fromkeys((lengths[0], lengths[-1])))

    def run_of(self, seed: int) -> Run | None:
        return next((run for run in self.runs if run.seed == seed), None)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Variants of one network on the same data, number of ranks and kind of device.

    Attributes:
        name: network and data set, and what else tells it from other benchmarks.
        variants: the baseline first, then shorter and longer schedules of plain SGD, then the rest by name.
        baseline: what speed-ups are relative to; None where no variant is plain SGD.
        schedules: plain SGD along schedules of different lengths, the baseline among them, shortest first.
    """

    name: str
    variants: tuple[Variant, ...]
    baseline: Variant | None
    schedules: tuple[Variant, ...]


def group_variants(runs: Iterable[Run]) -> tuple[list[Variant], list[LeftOut], list[str]]:
    """Variants by name, runs left out because their seed stands twice, and warnings."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        # Folders of a sweep keep apart what only the path of a replayed trace tells apart.
        settings = variant_settings(run.config)
        if run.folder is not None:
            # Nor does the length of a schedule that was matched to another run's cost, seed by seed.
            settings = {key: value for key, value in settings.items() if key not in SCHEDULE_LENGTH}
        key = [run.folder.name if run.folder else None, run.traits.num_gpus, settings]
        groups[json.dumps(key, sort_keys=True, default=str)].append(run)
    left_out: list[LeftOut] = []
    variants: list[Variant] = []
    for group in groups.values():
        by_seed: dict[int, Run] = {}
        for run in group:
            if (first := by_seed.setdefault(run.seed, run)) is not run:
                left_out.append(LeftOut(run.path, f"it repeats {first.path}: same configuration, same seed {run.seed}"))
        chosen = tuple(by_seed[seed] for seed in sorted(by_seed))
        variants.append(Variant(_name_of(chosen), chosen))
    named = _tell_apart(variants)
    return named, left_out, _strays(named)


def _name_of(runs: Sequence[Run]) -> str:
    if runs[0].folder is not None:
        return runs[0].folder.name
    common = _common_prefix([run.path.name for run in runs])
    if len(runs) > 1:
        common = _SEED_SUFFIX.sub("", common)
    return common if len(common) > 1 else runs[0].path.name


def _common_prefix(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _tell_apart(variants: list[Variant]) -> list[Variant]:
    """Names made unique: by the folder above, else by the settings that differ, else by a number."""
    for qualify in (_with_folder_above, _with_settings, _with_number):
        by_name: dict[str, list[Variant]] = defaultdict(list)
        for variant in variants:
            by_name[variant.name].append(variant)
        variants = [
            variant if len(same) == 1 else replace(variant, name=qualify(variant, same))
            for same in by_name.values()
            for variant in same
        ]
    return sorted(variants, key=lambda variant: variant.name)


def _with_folder_above(variant: Variant, same: list[Variant]) -> str:
    place = variant.first.folder or variant.first.path
    above = {(v.first.folder or v.first.path).parent for v in same}
    return f"{place.parent.name}/{variant.name}" if len(above) == len(same) else variant.name


def _with_settings(variant: Variant, same: list[Variant]) -> str:
    settings = variant_settings(variant.first.config)
    keys = sorted({key for other in same for key in differing(settings, variant_settings(other.first.config))})
    text = ", ".join(f"{key}={settings[key]}" for key in keys[:3])
    if not text:
        text = f"{variant.traits.num_gpus} GPUs"
    return f"{variant.name} ({text})"


def _with_number(variant: Variant, same: list[Variant]) -> str:
    return f"{variant.name} #{same.index(variant) + 1}"


def _strays(variants: list[Variant]) -> list[str]:
    """Warnings: one folder of a sweep that holds more than one configuration."""
    by_folder: dict[Path, list[Variant]] = defaultdict(list)
    for variant in variants:
        for folder in {run.folder for run in variant.runs if run.folder is not None}:
            by_folder[folder].append(variant)
    return [
        f"{folder} holds runs of different configurations, kept apart as {', '.join(v.name for v in same)}"
        for folder, same in by_folder.items()
        if len(same) > 1
    ]


def group_benchmarks(variants: Sequence[Variant], baseline: str | None = None) -> tuple[list[Benchmark], list[str]]:
    """Benchmarks by name, and warnings.

    Args:
        baseline: name of the variant to take as the baseline of its benchmark.

    Raises:
        ValueError: no variant has that name.
    """
    chosen = [v for v in variants if baseline in (v.name, v.short_name)]
    if baseline is not None and not chosen:
        raise ValueError(f"--baseline must be one of {', '.join(v.name for v in variants)}, got {baseline}")
    groups: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        key = [variant.traits.num_gpus, benchmark_settings(variant.first.config)]
        groups[json.dumps(key, sort_keys=True, default=str)].append(variant)
    names = _benchmark_names(list(groups.values()))
    benchmarks, warnings = [], []
    for name, members in zip(names, groups.values(), strict=True):
        base, warning = _baseline_of(members, chosen)
        if warning:
            warnings.append(f"{name}: {warning}")
        schedules = _schedules_of(base, members) if base else ()
        first = list(dict.fromkeys([*([base] if base else []), *schedules[::-1]]))
        ordered = [*first, *sorted((v for v in members if v not in first), key=lambda v: v.name)]
        benchmarks.append(Benchmark(name, tuple(ordered), base, schedules))
    return sorted(benchmarks, key=lambda b: b.name), warnings


def _benchmark_names(groups: list[list[Variant]]) -> list[str]:
    """``resnet18, cifar10``, with the settings in which benchmarks of the same name differ."""
    firsts = [group[0] for group in groups]
    plain = [f"{v.traits.network}, {v.traits.dataset}" for v in firsts]
    names = []
    for name, first in zip(plain, firsts, strict=True):
        same = [v for v, other in zip(firsts, plain, strict=True) if other == name]
        settings = _benchmark_labels(first)
        keys = sorted({key for v in same for key in differing(settings, _benchmark_labels(v))})
        names.append(", ".join([name, *(f"{key}={settings[key]}" for key in keys)]))
    return names


def _benchmark_labels(variant: Variant) -> dict[str, Any]:
    return benchmark_settings(variant.first.config) | {"GPUs": variant.traits.num_gpus}


def _baseline_of(members: Sequence[Variant], chosen: Sequence[Variant]) -> tuple[Variant | None, str]:
    """The baseline of a benchmark and a warning: plain SGD at the most epochs, unless one was chosen."""
    if named := [v for v in members if v in chosen]:
        return named[0], ""
    said = {v.first.baseline for v in members} - {None}
    if len(said) == 1 and (named := [v for v in members if v.short_name in said]):
        return named[0], ""
    plain = [v for v in members if v.traits.strategy == "sgd"]
    if not plain:
        return None, "no baseline (localized.rule=none, no other strategy): speed-ups are not given"
    longest = max(v.epochs for v in plain)
    candidates = [v for v in plain if v.epochs == longest]
    usual = [v for v in candidates if v.short_name in _BASELINE_NAMES]
    base = (usual or candidates)[0]
    if len(candidates) > 1 and len(usual) != 1:
        others = ", ".join(v.name for v in candidates if v is not base)
        return base, f"{base.name} is taken as the baseline, but so could be {others}; --baseline chooses"
    return base, ""


def _schedules_of(baseline: Variant, members: Sequence[Variant]) -> tuple[Variant, ...]:
    """Plain SGD runs that differ from the baseline in the length of their schedule alone, shortest first."""
    if baseline.traits.strategy != "sgd":
        return ()
    shared = schedule_settings(baseline.first.config)
    same = [v for v in members if v.traits.strategy == "sgd" and schedule_settings(v.first.config) == shared]
    return tuple(sorted(same, key=lambda v: (v.epochs, v is not baseline)))
