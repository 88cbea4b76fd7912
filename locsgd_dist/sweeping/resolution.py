"""What a run takes from finished ones: a boundary trace, a number of epochs; and how far a run directory has come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from locsgd_dist.checkpoint import checkpointed_epochs, differing_keys
from locsgd_dist.config import Config, ConfigError, load_config, parse_config
from locsgd_dist.recording import RunDirectory
from locsgd_dist.sweeping.expansion import Plan, Run, as_argument


class State(Enum):
    """How far a run directory has come."""

    MISSING = "missing"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


@dataclass(frozen=True)
class CostMatch:
    """The number of epochs at which a run costs as much as another one.

    Attributes:
        unit: ``cpu_seconds`` where ``train.device`` is cpu (processes that share cores stretch each other's
            wall-clock, not their CPU time), else ``seconds``. Evaluations do not count.
        of: cost of the run to be matched.
        baseline: cost of the baseline's run of the same seed.
        epochs: ``of / baseline`` of the baseline's epochs, rounded, at least 1.
    """

    unit: str
    of: float
    baseline: float
    epochs: int

    @property
    def ratio(self) -> float:
        return self.of / self.baseline

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Resolved:
    """A run whose needs are finished: its whole command line."""

    arguments: tuple[str, ...]
    cost_match: CostMatch | None = None

    @cached_property
    def config(self) -> Config:
        """The configuration that the command line describes."""
        return parse_config(self.arguments)


def resolve(plan: Plan, run: Run) -> Resolved:
    """The command line of ``run``.

    Raises:
        ValueError: what it needs is not finished or does not record what is needed.
    """
    variant = run.variant
    for other in plan.needs(run):
        if state_of(other) is not State.FINISHED:
            raise ValueError(f"{run.name} needs {other.name}, which is not finished")
    arguments = [*variant.arguments]
    if variant.trace_of:
        trace = plan.run_of(variant.trace_of, run.seed).directory
        arguments += ["--selection.kind=replay", f"--selection.trace={trace}"]
    match = None
    if variant.cost_of:
        assert variant.baseline is not None
        baseline = plan.run_of(variant.baseline, run.seed)
        match = match_cost(
            plan.run_of(variant.cost_of, run.seed).directory,
            baseline.directory,
            unit="cpu_seconds" if variant.config.train.device == "cpu" else "seconds",
        )
        arguments.append(f"--train.epochs={match.epochs}")
        if variant.config.optim.schedule == "step":
            # A schedule in steps of epochs would never come to its end in a shorter run: it is compressed with it.
            share = match.epochs / baseline.variant.config.train.epochs
            arguments.append(f"--optim.step_epochs={max(1, round(variant.config.optim.step_epochs * share))}")
    arguments += [f"--train.seed={run.seed}", as_argument("run.dir", str(run.directory))]
    return Resolved(tuple(arguments), match)


def match_cost(of: Path, baseline: Path, unit: str) -> CostMatch:
    """Epochs of the baseline's kind that cost as much as the run ``of``.

    Raises:
        ValueError: a run does not record its cost.
    """
    records = {path: RunDirectory(path).load_metrics() for path in (of, baseline)}
    for path, metrics in records.items():
        if not metrics or any(not record.get(unit) for record in metrics):
            raise ValueError(f"{path} does not record {unit} of each epoch, so that its cost cannot be matched")
    costs = {path: sum(record[unit] for record in metrics) for path, metrics in records.items()}
    epochs = max(1, round(costs[of] / costs[baseline] * len(records[baseline])))
    return CostMatch(unit, of=costs[of], baseline=costs[baseline], epochs=epochs)


def state_of(run: Run) -> State:
    """How far a run has come, by what its directory records; the epochs are its own configuration's."""
    directory = RunDirectory(run.directory)
    if not directory.config.is_file():
        return State.MISSING
    metrics = directory.load_metrics()
    epochs = directory.load_config().get("train", {}).get("epochs") or 0
    # The last epoch is recorded before its checkpoint is written: only both together are the end.
    is_recorded = bool(metrics) and metrics[-1].get("epoch") == epochs - 1
    return State.FINISHED if is_recorded and checkpointed_epochs(run.directory) >= epochs else State.UNFINISHED


def check_existing(plan: Plan, runs: Iterable[Run]) -> None:
    """Refuses directories that hold runs of another configuration.

    Keys that did not exist when a run was started count as their defaults; where and how a run is carried out may
    differ, as when a run is resumed.

    Raises:
        ValueError: one line that names the directory and the keys.
    """
    for run in runs:
        if not (run.directory / "config.yaml").is_file():
            continue
        try:
            saved = load_config(run.directory / "config.yaml")
        except ConfigError as error:
            raise ValueError(f"{run.directory} holds a run that cannot be compared: {error}") from None
        if changed := _changed(plan, run, saved):
            raise ValueError(
                f"{run.directory} holds a run with another configuration ({', '.join(changed[:5])}); "
                "give another --output or move that run away"
            )


def _changed(plan: Plan, run: Run, saved: Config) -> list[str]:
    ignored = set()
    try:
        wanted = resolve(plan, run).config
    except ValueError:  # what it needs is not finished: these are not known yet
        wanted = replace(run.variant.config, train=replace(run.variant.config.train, seed=run.seed))
        ignored |= {"selection.trace"} if run.variant.trace_of else set()
        ignored |= {"train.epochs", "optim.step_epochs"} if run.variant.cost_of else set()
    if run.variant.trace_of and _place(wanted) == _place(saved):
        ignored.add("selection.trace")
    return [key for key in differing_keys(asdict(saved), asdict(wanted)) if key not in ignored]


def _place(config: Config) -> tuple[str, ...]:
    """VARIANT/seed-S of a trace: the output of a sweep may be moved as a whole."""
    return Path(config.selection.trace or "").parts[-2:]
