"""The paper's tables with the runs that match their rows beside them. The printed figures are in paper.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from locsgd_dist.reporting.comparison.figures import Figures
from locsgd_dist.reporting.comparison.grouping import Benchmark, Variant
from locsgd_dist.reporting.comparison.readings import iso_accuracy, loss_within
from locsgd_dist.reporting.comparison.statistics import Summary
from locsgd_dist.reporting.comparison.traits import flat

NUM_TABLES = 8
_CRITERIA = ("weak_supervision", "batch", "constants")


@lru_cache(maxsize=1)
def paper() -> Mapping[str, Any]:
    """The content of paper.yaml."""
    text = files("locsgd_dist.reporting.comparison").joinpath("paper.yaml").read_text(encoding="utf-8")
    content: Mapping[str, Any] = yaml.safe_load(text)
    return content


@dataclass(frozen=True, eq=False)
class Cell:
    """A figure of the paper beside ours, in the same unit.

    Attributes:
        paper: as printed; None where the paper has none.
        ours: over seeds, in percent for errors and losses.
    """

    paper: float | None
    ours: Summary | None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        if self.paper is None or self.ours is None or self.ours.mean is None:
            return None
        return self.ours.mean - self.paper

    def to_json(self) -> dict[str, Any]:
        return {
            "paper": self.paper,
            "ours": None if self.ours is None else self.ours.to_json(),
            "difference": self.difference,
        }


@dataclass(frozen=True, eq=False)
class Match:
    """A variant that stands beside a row.

    Attributes:
        departures: settings in which it is not the paper's set-up, as ``key=value (paper: value)``.
    """

    variant: Variant
    cells: Mapping[str, Cell]
    departures: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the paper's and what matches it; no match: not run.

    Attributes:
        columns: name of each figure of the row → as printed.
    """

    network: str
    dataset: str
    label: str
    columns: Mapping[str, float | None]
    matches: tuple[Match, ...]
    note: str = ""


@dataclass(frozen=True, eq=False)
class PaperTable:
    """One of the paper's tables."""

    number: int
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def is_matched(self) -> bool:
        return any(row.matches for row in self.rows)


COLUMNS = {
    "top1_error": "Top-1 error, %",
    "speed_up": "Speed-up",
    "epochs": "Epochs",
    "local_sgd_loss": "Loss of LoCal+SGD, %",
    "freezing_loss": "Loss of freezing, %",
}
"""Name of each figure in the tables → heading."""


def paper_tables(benchmarks: Sequence[Benchmark], figures: Figures) -> list[PaperTable]:
    """All eight, in order."""
    builders = {"strategies": _strategy_row, "iso_accuracy": _iso_accuracy_row, "iso_runtime": _iso_runtime_row}
    tables = []
    for table in paper()["tables"]:
        rows = tuple(builders[table["form"]](row, benchmarks, figures) for row in table["rows"])
        columns = tuple(name for name in COLUMNS if any(name in row for row in table["rows"]))
        tables.append(PaperTable(table["number"], table["title"], columns, rows))
    return tables


def _strategy_row(row: Mapping[str, Any], benchmarks: Sequence[Benchmark], figures: Figures) -> Row:
    matches = []
    for benchmark in benchmarks:
        for variant in benchmark.variants:
            if _matches(row, benchmark, variant):
                of = figures.of(variant)
                ours = {"top1_error": percent(of["final_error"]), "speed_up": of["speed_up"]}
                matches.append(_match(row, variant, ours))
    return _row(row, matches)


def _matches(row: Mapping[str, Any], benchmark: Benchmark, variant: Variant) -> bool:
    """Network, data set, number of GPUs, strategy, and what else the row says. Of plain SGD, the baseline only."""
    traits = variant.traits
    if (row["network"], row["dataset"]) != (traits.network, traits.dataset):
        return False
    if (row.get("gpus", 1), row["strategy"]) != (traits.num_gpus, traits.strategy):
        return False
    if traits.strategy == "sgd" and variant is not benchmark.baseline:
        return False
    return all(row[name] == getattr(traits, name) for name in _CRITERIA if name in row)


def _iso_accuracy_row(row: Mapping[str, Any], benchmarks: Sequence[Benchmark], figures: Figures) -> Row:
    """Both rows of a network speak of the LoCal+SGD variant: where SGD reaches its accuracy, and where it does."""
    matches = []
    for benchmark in benchmarks:
        for reading in iso_accuracy(benchmark, figures):
            if not _matches({**row, "strategy": "local_sgd"}, benchmark, reading.variant):
                continue
            if row["strategy"] == "sgd":
                one = Summary.of(dict.fromkeys(reading.speed_up.per_seed, 1.0))
                ours = {
                    "epochs": reading.baseline_epochs,
                    "top1_error": percent(reading.baseline_error),
                    "speed_up": one,
                }
            else:
                ours = {
                    "epochs": reading.variant_epochs,
                    "top1_error": percent(reading.error),
                    "speed_up": reading.speed_up,
                }
            matches.append(_match(row, reading.variant, ours))
    return _row(row, matches)


def _iso_runtime_row(row: Mapping[str, Any], benchmarks: Sequence[Benchmark], figures: Figures) -> Row:
    matches = []
    for benchmark in benchmarks:
        traits = benchmark.variants[0].traits
        if (row["network"], row["dataset"], 1) != (traits.network, traits.dataset, traits.num_gpus):
            continue
        reading = loss_within(row["max_loss"], benchmark.variants, figures)
        if reading.local_sgd is not None:
            ours = {"local_sgd_loss": percent(figures.of(reading.local_sgd)["error_increase"])}
            if reading.freezing is not None:
                ours["freezing_loss"] = percent(figures.of(reading.freezing)["error_increase"])
            matches.append(_match(row, reading.local_sgd, ours))
    return _row({**row, "label": f"at most {row['max_loss']:g} % loss"}, matches)


def _match(row: Mapping[str, Any], variant: Variant, ours: Mapping[str, Summary]) -> Match:
    names = [name for name in COLUMNS if name in row or name in ours]
    return Match(
        variant, {name: Cell(row.get(name), ours.get(name)) for name in names if name in row}, departures(variant)
    )


def _row(row: Mapping[str, Any], matches: Sequence[Match]) -> Row:
    return Row(
        row["network"],
        row["dataset"],
        row["label"],
        {name: row.get(name) for name in COLUMNS if name in row},
        tuple(matches),
        row.get("note", ""),
    )


def departures(variant: Variant) -> tuple[str, ...]:
    """Settings in which a variant is not the paper's set-up; empty for a benchmark that the paper does not have."""
    traits, settings = variant.traits, flat(variant.first.config)
    for setup in paper()["setups"]:
        if traits.network in setup["networks"] and traits.dataset == setup["dataset"]:
            expected = dict(setup["config"])
            if (rate := setup["optim.lr"].get(traits.num_gpus)) is not None:
                expected["optim.lr"] = rate
            if settings["localized.rule"] != "none":
                expected |= {**setup["localized"], "selection.lmax": 0.75}
                if traits.strategy.startswith("local_sgd"):
                    expected |= {"localized.lr": 0.01, "localized.batch_fraction": 1.0}
                if settings["selection.kind"] == "dynamic":
                    expected |= {"selection.alpha": 0.95, "selection.window": "printed"}
            if settings["optim.schedule"] != expected["optim.schedule"]:  # then its steps are of no account
                expected = {key: value for key, value in expected.items() if not key.startswith("optim.step_")}
            return tuple(
                f"{key}={settings[key]} (paper: {'all' if value is None else value})"
                for key, value in expected.items()
                if not _same(settings[key], value)
            )
    return ()


def _same(value: Any, expected: Any) -> bool:
    if expected is not None and value is None:
        return True  # left to its default, which is the paper's (model.width)
    return bool(value == expected)


def percent(summary: Summary) -> Summary:
    """Fractions as percent."""
    return Summary({seed: 100 * value for seed, value in summary.per_seed.items()})
