"""What a sweep file says: benchmarks x variants x grid points x seeds, and which runs need which."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

#: Keys that the sweep itself sets in each run.
OWNED_KEYS = ("train.seed", "run.dir", "run.resume")
REPRODUCIBLE = (*(f"table{n}" for n in range(1, 9)), *(f"figure{n}" for n in range(3, 7)))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Benchmark:
    """A network and the data it is trained on; each variant runs on every benchmark unless it names some."""

    configs: list[str] = field(default_factory=list)
    """Configurations, packaged names or files, merged in order."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values by ``section.key``."""
    label: str | None = None
    """Name in reports (default: its key in the file)."""


@dataclass(frozen=True)
class Variant:
    """One way to train: what it merges over a benchmark, and what it needs of other runs."""

    configs: list[str] = field(default_factory=list)
    """Overlays merged after the benchmark's, such as ``strategies/freezing``."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values by ``section.key``."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Lists of values by ``section.key``: a run for each combination."""
    benchmarks: list[str] | None = None
    """The benchmarks it runs on (default: all)."""
    trace_of: str | None = None
    """Variant whose recorded boundary, of the same benchmark and seed, is replayed."""
    cost_of: str | None = None
    """Variant whose training cost, of the same benchmark and seed, this one is to match by its number of epochs."""
    label: str | None = None
    """Name in reports (default: its key in the file)."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    name: str
    """Of the sweep; the default output folder is ``runs/NAME``."""
    variants: dict[str, Variant]
    title: str = ""
    """One line for reports."""
    reproduces: str | None = None
    """The paper's table or figure: table1 to table8, figure3 to figure6."""
    base: list[str] = field(default_factory=list)
    """Configurations merged first in every run."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values by ``section.key`` in every run."""
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    """Networks and data by name; without any, ``base`` is the only one."""
    baseline: str | None = None
    """Variant that speed-ups and costs are relative to (default: ``sgd``, if there is one)."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Values of train.seed."""
    nproc: int = 1
    """Ranks of each run."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Parameters of the Slurm jobs, in submitit's names without their prefix: partition, time, account, ..."""


def load_sweep(path: Path) -> Sweep:
    """Reads and checks a sweep file.

    Raises:
        ValueError: one line that names the file and the entry at fault.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"sweep file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"sweep file {path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return _sweep(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def grid_points(variant: Variant) -> list[dict[str, Any]]:
    """Every combination of the grid's values; one empty point where there is no grid."""
    return [dict(zip(variant.grid, values, strict=True)) for values in itertools.product(*variant.grid.values())]


def _sweep(content: Any) -> Sweep:
    entries = _entries(content, Sweep, "")
    entries["variants"] = {
        name: Variant(**_entries(value or {}, Variant, f"variants.{name}."))
        for name, value in _mapping(entries["variants"], "variants").items()
    }
    entries["benchmarks"] = {
        name: Benchmark(**_entries(value or {}, Benchmark, f"benchmarks.{name}."))
        for name, value in _mapping(entries.get("benchmarks", {}), "benchmarks").items()
    }
    if "baseline" not in entries and "sgd" in entries["variants"]:
        entries["baseline"] = "sgd"
    sweep = Sweep(**entries)
    _check(sweep)
    return sweep


def _check(sweep: Sweep) -> None:
    for name in (sweep.name, *sweep.benchmarks, *sweep.variants):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"names must consist of letters, digits, dots, hyphens and underscores, got {name!r}")
    if not sweep.variants:
        raise ValueError("variants must name at least one")
    if sweep.reproduces is not None and sweep.reproduces not in REPRODUCIBLE:
        raise ValueError(f"reproduces must be one of {', '.join(REPRODUCIBLE)}, got {sweep.reproduces!r}")
    if not sweep.seeds or any(type(seed) is not int or seed < 0 for seed in sweep.seeds):
        raise ValueError(f"seeds must be a list of whole numbers >= 0, got {sweep.seeds!r}")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ValueError(f"seeds must differ, got {sweep.seeds}")
    if type(sweep.nproc) is not int or sweep.nproc < 1:
        raise ValueError(f"nproc must be a whole number >= 1, got {sweep.nproc!r}")
    if not (sweep.base or sweep.benchmarks):
        raise ValueError("base or benchmarks must name a configuration, such as base: [cifar10/resnet18]")
    if sweep.baseline is not None:
        _reference(sweep.baseline, sweep.variants, "baseline")
        if sweep.variants[sweep.baseline].grid:
            raise ValueError(f"baseline must be a variant without a grid, got {sweep.baseline}")
    check_overrides(sweep.overrides, "overrides")
    for name, benchmark in sweep.benchmarks.items():
        check_overrides(benchmark.overrides, f"benchmarks.{name}.overrides")
    for name, variant in sweep.variants.items():
        _check_variant(name, variant, sweep)
    _check_order(sweep)


def _check_variant(name: str, variant: Variant, sweep: Sweep) -> None:
    check_overrides(variant.overrides, f"variants.{name}.overrides")
    check_overrides(variant.grid, f"variants.{name}.grid")
    for key, values in variant.grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"variants.{name}.grid.{key} must be a list of values, got {values!r}")
    for benchmark in variant.benchmarks or []:
        _reference(benchmark, sweep.benchmarks, f"variants.{name}.benchmarks")
    for key in ("trace_of", "cost_of"):
        other = getattr(variant, key)
        if other is None:
            continue
        _reference(other, sweep.variants, f"variants.{name}.{key}")
        if sweep.variants[other].grid not in ({}, variant.grid):
            raise ValueError(f"variants.{name}.{key}: {other} has a grid, so {name} must have the same one")
        if not set(benchmarks_of(variant, sweep)) <= set(benchmarks_of(sweep.variants[other], sweep)):
            raise ValueError(f"variants.{name}.{key}: {other} does not run on all of its benchmarks")
    if variant.cost_of is not None:
        if sweep.baseline in (None, name):
            raise ValueError(f"variants.{name}.cost_of needs another variant as the sweep's baseline")
        if not set(benchmarks_of(variant, sweep)) <= set(benchmarks_of(sweep.variants[sweep.baseline], sweep)):
            raise ValueError(f"variants.{name}.cost_of: the baseline does not run on all of its benchmarks")


def benchmarks_of(variant: Variant, sweep: Sweep) -> list[str | None]:
    """Names of the benchmarks that a variant runs on; ``[None]`` where the sweep has none."""
    names = list(sweep.benchmarks) if variant.benchmarks is None else variant.benchmarks
    return [*names] if sweep.benchmarks else [None]


def needs_of(variant: Variant, sweep: Sweep) -> list[str]:
    """Variants whose runs must be finished before this one's can start."""
    needs = [variant.trace_of, variant.cost_of, sweep.baseline if variant.cost_of else None]
    return list(dict.fromkeys(name for name in needs if name is not None))


def _check_order(sweep: Sweep) -> None:
    done: set[str] = set()
    while len(done) < len(sweep.variants):
        ready = {n for n, v in sweep.variants.items() if n not in done and set(needs_of(v, sweep)) <= done}
        if not ready:
            waiting = ", ".join(name for name in sweep.variants if name not in done)
            raise ValueError(f"variants must not need each other in a circle: {waiting}")
        done |= ready


def check_overrides(overrides: Any, where: str) -> None:
    """Keys must read ``section.key`` and not be the sweep's own. Raises ValueError naming the entry."""
    for key in _mapping(overrides, where):
        if not isinstance(key, str) or not re.fullmatch(r"\w+(\.\w+)+", key):
            raise ValueError(f"{where} must hold section.key: value, got {key!r}")
        if key in OWNED_KEYS:
            raise ValueError(f"{where} must not set {key}: each run of a sweep has its own")


def _entries(content: Any, cls: type, where: str) -> dict[str, Any]:
    """The mapping's entries, checked against the fields of ``cls``."""
    known = {f.name: f for f in fields(cls)}
    entries = dict(_mapping(content, where.rstrip(".") or "the file"))
    for key, value in entries.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            raise ValueError(f"unknown entry {where}{key}{hint}")
        kind = str(known[key].type)
        if value is None and kind.endswith("None"):
            continue
        if kind.startswith("list"):
            of_names = kind.startswith("list[str]")
            if not isinstance(value, list) or (of_names and not all(isinstance(item, str) for item in value)):
                raise ValueError(f"{where}{key} must be a list{' of names' if of_names else ''}, got {value!r}")
        elif kind.startswith("dict"):
            _mapping(value, f"{where}{key}")
        elif kind.startswith("str") and not isinstance(value, str):
            raise ValueError(f"{where}{key} must be text, got {value!r}")
    for key, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and key not in entries:
            raise ValueError(f"{where}{key} is missing")
    return entries


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    return value


def _reference(name: str, known: Iterable[str], where: str) -> None:
    if name not in known:
        raise ValueError(f"{where} must be one of {', '.join(known)}, got {name!r}")
