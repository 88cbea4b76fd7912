"""From a sweep file to its runs: command lines, folders, and what each run needs of others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from locsgd_dist.config import Config, ConfigError, check_config, parse_config
from locsgd_dist.localized import SelectionConfig
from locsgd_dist.memory import BatchConfig
from locsgd_dist.optimization import OptimConfig
from locsgd_dist.recording import RunConfig
from locsgd_dist.sweeping.spec import OWNED_KEYS, Sweep, Variant, benchmarks_of, grid_points


@dataclass(frozen=True)
class PlannedVariant:
    """A variant on one benchmark at one point of its grid: the runs that differ in the seed alone.

    Attributes:
        name: folder of its runs in the sweep's output, unique in the sweep.
        strategy: the variant's name in the file.
        point: the grid's values by ``section.key``.
        arguments: command line of the trainer, without what depends on the seed and on other runs.
        config: the configuration that ``arguments`` describe.
        trace_of, cost_of, baseline: names of other planned variants, on the same benchmark.
    """

    name: str
    label: str
    strategy: str
    benchmark: str | None
    benchmark_label: str | None
    point: Mapping[str, Any]
    arguments: tuple[str, ...]
    config: Config
    trace_of: str | None = None
    cost_of: str | None = None
    baseline: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Planned variants whose run of the same seed must be finished first."""
        names = (self.trace_of, self.cost_of, self.baseline if self.cost_of else None)
        return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class Run:
    """One run: a planned variant and a seed."""

    variant: PlannedVariant
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}/seed-{self.seed}"

    @property
    def log(self) -> Path:
        """Output of the run's processes, beside its directory."""
        return self.directory.with_name(f"{self.directory.name}.log")


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, in the order in which they are to start: all variants of a seed before the next seed.

    Attributes:
        selected: the runs that are to be carried out now; the others only tell what they depend on.
    """

    sweep: Sweep
    output: Path
    variants: tuple[PlannedVariant, ...]
    runs: tuple[Run, ...]
    extra: tuple[str, ...] = ()
    selected: tuple[Run, ...] = field(default=())

    def run_of(self, variant: str, seed: int) -> Run:
        return next(run for run in self.runs if run.variant.name == variant and run.seed == seed)

    def needs(self, run: Run) -> list[Run]:
        """Runs that must be finished before ``run`` starts."""
        return [self.run_of(name, run.seed) for name in run.variant.needs]


def plan_sweep(
    sweep: Sweep,
    output: Path,
    extra: Sequence[str] = (),
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """Expands a sweep and parses the configuration of every run.

    Args:
        sweep: the sweep file.
        output: folder of the runs: ``output/VARIANT/seed-S``.
        extra: ``--section.key=value`` for all runs.
        only: variants to select, by the file's or the expanded name, with ``*`` as a wildcard; None selects all.
        seeds: seeds to select; None selects all.

    Raises:
        ValueError: one line that names the variant and the key that is wrong, or a selection that matches nothing.
    """
    _check_extra(extra)
    output = output.expanduser().absolute()
    variants = tuple(
        _planned(sweep, name, variant, benchmark, point, extra)
        for benchmark in sweep.benchmarks or [None]
        for name, variant in sweep.variants.items()
        if benchmark in benchmarks_of(variant, sweep)
        for point in grid_points(variant)
    )
    names = [variant.name for variant in variants]
    if clash := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two variants are called {clash} once benchmarks and grid points are added; rename one")
    runs = tuple(
        Run(variant, seed, output / variant.name / f"seed-{seed}") for seed in sweep.seeds for variant in variants
    )
    plan = Plan(sweep, output, variants, _in_order(runs), tuple(extra))
    return replace(plan, selected=_select(plan, only, seeds))


def check_machine(plan: Plan) -> None:
    """Checks of every selected run what this machine can tell: data, networks, rules, devices.

    Raises:
        ValueError: one line that names the variant and the key.
    """
    checked: set[str] = set()
    for variant in dict.fromkeys(run.variant.name for run in plan.selected):
        config = next(v.config for v in plan.variants if v.name == variant)
        own_trace = config.selection.kind == "replay" and next(v for v in plan.variants if v.name == variant).trace_of
        # What the checks do not look at would only make them repeat; a trace of this sweep need not exist yet.
        config = replace(
            config,
            selection=SelectionConfig() if own_trace or config.selection.kind != "replay" else config.selection,
            optim=OptimConfig(),
            batch=BatchConfig(),
            train=replace(config.train, epochs=1, seed=0),
            run=RunConfig(dir=str(plan.output), resume="never"),
        )
        if (key := config.to_yaml()) in checked:
            continue
        try:
            check_config(config)
        except ConfigError as error:
            raise ValueError(f"variant {variant}: {error}") from None
        checked.add(key)


def as_argument(key: str, value: Any) -> str:
    """``--section.key=value`` as the trainer's command line takes it."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return f"--{key}={text.strip().removesuffix('...').strip()}"


def _planned(
    sweep: Sweep, name: str, variant: Variant, benchmark: str | None, point: Mapping[str, Any], extra: Sequence[str]
) -> PlannedVariant:
    given = sweep.benchmarks[benchmark] if benchmark is not None else None
    configs = [*sweep.base, *(given.configs if given else []), *variant.configs]
    overrides = {**sweep.overrides, **(given.overrides if given else {}), **variant.overrides, **point}
    arguments = [argument for config in configs for argument in ("--config", config)]
    arguments += [as_argument(key, value) for key, value in overrides.items()]
    arguments += extra
    full_name = _name(benchmark, name, point)

    def named(other: str | None) -> str | None:
        if other is None:
            return None
        return _name(benchmark, other, point if sweep.variants[other].grid else {})

    # A trace that will be recorded by another run: any text keeps the configuration's own check content.
    pending = ["--selection.kind=replay", "--selection.trace=pending"] if variant.trace_of else []
    try:
        config = parse_config([*arguments, *pending])
    except ConfigError as error:
        raise ValueError(f"variant {full_name}: {error}") from None
    has_baseline = sweep.baseline is not None and benchmark in benchmarks_of(sweep.variants[sweep.baseline], sweep)
    label = variant.label or name
    values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items())
    return PlannedVariant(
        name=full_name,
        label=f"{label} ({values})" if values else label,
        strategy=name,
        benchmark=benchmark,
        benchmark_label=(given.label or benchmark) if given else None,
        point=dict(point),
        arguments=tuple(arguments),
        config=config,
        trace_of=named(variant.trace_of),
        cost_of=named(variant.cost_of),
        baseline=named(sweep.baseline) if has_baseline else None,
    )


def _name(benchmark: str | None, variant: str, point: Mapping[str, Any]) -> str:
    """``BENCHMARK-VARIANT-keyvalue...``, fit for a folder."""
    parts = [benchmark] if benchmark else []
    parts += [variant, *(f"{key.rpartition('.')[2]}{value}" for key, value in point.items())]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(parts))


def _in_order(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs as given, but each behind what it needs."""
    placed: dict[tuple[str, int], Run] = {}
    waiting = list(runs)
    while waiting:
        for run in waiting:
            if all((name, run.seed) in placed for name in run.variant.needs):
                placed[run.variant.name, run.seed] = run
                waiting.remove(run)
                break
    return tuple(placed.values())


def _select(plan: Plan, only: Sequence[str] | None, seeds: Sequence[int] | None) -> tuple[Run, ...]:
    for pattern in only or []:
        if not any(_matches(variant, pattern) for variant in plan.variants):
            names = dict.fromkeys(name for v in plan.variants for name in (v.strategy, v.name))
            raise ValueError(f"--only must name variants of the sweep ({', '.join(names)}), got {pattern}")
    for seed in seeds or []:
        if seed not in plan.sweep.seeds:
            raise ValueError(f"--seeds must be among the sweep's, {plan.sweep.seeds}, got {seed}")
    return tuple(
        run
        for run in plan.runs
        if (only is None or any(_matches(run.variant, pattern) for pattern in only))
        and (seeds is None or run.seed in seeds)
    )


def _matches(variant: PlannedVariant, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (variant.name, variant.strategy, variant.benchmark or ""))


def _check_extra(extra: Sequence[str]) -> None:
    for argument in extra:
        match = re.fullmatch(r"--(\w+(?:\.\w+)+)=.*", argument, re.DOTALL)
        if match is None:
            raise ValueError(f"arguments for all runs must read --section.key=value, got {argument!r}")
        if match[1] in OWNED_KEYS:
            raise ValueError(f"--{match[1]} must not be given: each run of a sweep has its own")
