"""The documentation's figures are those of `benchmarks/results/`, rounded.

A table that shows a result stands behind a mark, `<!-- from: benchmarks/results/NAME.json -->`, and has an entry in
`EXPECTED`, which makes its cells of the JSON file; figures in running text are `test_figures_in_text.py`'s.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from documented_results import MIB, ROOT, Cells, mib, result, spread, variants
from speed_tables import SPEED_TABLES
from study_rows import STUDIES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_MARKED = re.compile(r"<!-- from: benchmarks/results/([\w.-]+\.json) -->\n+((?:\|.*\n)+)")


def rows_of(table: str) -> list[list[str]]:
    """Cells of a Markdown table without its head."""
    lines = [line.strip().strip("|").split("|") for line in table.strip().splitlines()]
    assert set("".join(lines[1])) <= set("-: "), "no table"
    assert {len(line) for line in lines} == {len(lines[0])}
    return [[cell.strip() for cell in line] for line in lines[2:]]


VARIANTS = {
    "plain SGD, 20 epochs": "sgd",
    "plain SGD, 18 epochs": "sgd-18",
    "plain SGD, 16 epochs": "sgd-16",
    "plain SGD for the time of LoCal+SGD (16 epochs)": "sgd-short",
    "plain SGD, 14 epochs": "sgd-14",
    "LoCal+SGD, dynamic (the printed rule, η = .01)": "local-dynamic",
    "LoCal+SGD, dynamic, η = .001": "local-dynamic-eta0.001",
    "LoCal+SGD, static schedule": "local-static",
    "freezing, on LoCal+SGD's boundaries": "freezing",
    "random direction, same boundaries": "random",
    "stochastic depth, survival .5": "stochastic-depth",
    "pruning during training": "pruning",
}


def table2_small() -> Cells:
    found = variants("table2_small.json")
    assert set(found) == set(VARIANTS.values())
    return {label: _variant_cells(found[name]["figures"]) for label, name in VARIANTS.items()}


def study(name: str) -> Cells:
    found = variants(name)
    assert set(found) == set(STUDIES[name].values())
    return {
        label: [*_variant_cells(found[variant]["figures"]), _above_the_line(found[variant])]
        for label, variant in STUDIES[name].items()
    }


def _above_the_line(variant: dict[str, Any]) -> str:
    """How far above plain SGD's schedules at the same operations, in points, where these reach so far."""
    advantage = (variant["iso_cost"] or {}).get("flops", {}).get("advantage") or {"n": 0}
    return f"{spread(advantage, 1, scale=100)}" if advantage["n"] else "–"


def _variant_cells(figures: dict[str, Any]) -> list[str]:
    return [
        str(figures["final_error"]["n"]),
        spread(figures["final_error"], 1, scale=-100, offset=100),
        spread(figures["flops_ratio"], 2),
        spread(figures["cpu_speed_up"], 2),
        mib(figures["footprint_last_bytes"]["mean"]),
    ]


def doubling() -> Cells:
    return {
        str(epoch["epoch"] + 1): [
            str(epoch["boundary"]),
            str(epoch["per_gpu_batch"]),
            mib(epoch["footprint_bytes"]),
            str(epoch["num_steps"]),
            str(epoch["grad_all_reduce_count"]),
            mib(epoch["grad_all_reduce_bytes"]),
            mib(epoch["replica_sync_bytes"]),
            f"{epoch['images_per_second']:.0f}",
        ]
        for epoch in result("cifar10_doubling.json")["epochs"]
    }


def slow_link() -> Cells:
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in result("link_accuracy.json")["runs"]:
        runs.setdefault(run["variant"], []).append(run)

    def over_seeds(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    return {
        variant: [
            over_seeds([100 * run["top1"] for run in of_seeds], 1),
            f"{statistics.mean(run['training_seconds'] for run in of_seeds):.0f} s",
            over_seeds(
                [
                    plain["training_seconds"] / run["training_seconds"]
                    for plain, run in zip(runs["sgd"], of_seeds, strict=True)
                ],
                2,
            ),
            f"{of_seeds[0]['exchanged_bytes'] / MIB:.0f} MiB",
            str(of_seeds[0]["exchanges"]),
            mib(of_seeds[0]["footprint_bytes"]),
        ]
        for variant, of_seeds in runs.items()
    }


def checkpoint_cost() -> Cells:
    labels = {
        "training stopped, written in the background (as it is done)": "stopped",
        "until the file stands on disk, synced and with its checksum": "written",
        "`torch.save` of model and optimizer": "torch.save",
        "the same, synced": "torch.save, synced",
    }
    seconds = result("checkpoint_cost.json")["seconds"]
    assert set(seconds) == set(labels.values())
    return {label: [f"{seconds[name]['median']:.2f}"] for label, name in labels.items()}


EXPECTED: dict[str, Callable[[], Cells]] = {
    **{name: partial(study, name) for name in STUDIES},
    **SPEED_TABLES,
    "table2_small.json": table2_small,
    "cifar10_doubling.json": doubling,
    "checkpoint_cost.json": checkpoint_cost,
    "link_accuracy.json": slow_link,
}
#: Tables that show some of the rows.
IN_PART = {"cifar10_doubling.json"}


def marked_tables() -> list[Any]:
    return [
        pytest.param(name, table, id=f"{page.name}-{name}")
        for page in PAGES
        for name, table in _MARKED.findall(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("name", "table"), marked_tables())
def test_a_table_shows_its_result(name: str, table: str) -> None:
    expected = EXPECTED[name]()
    shown = {label: cells for label, *cells in rows_of(table)}
    assert shown == {label: expected.get(label) for label in shown}
    assert name in IN_PART or set(shown) == set(expected)


def test_every_result_that_has_a_table_is_compared() -> None:
    assert {table.values[0] for table in marked_tables()} == set(EXPECTED)


def test_the_fault_matrix_is_the_measured_one() -> None:
    """A cell names the ranks on which it passed: finished, nothing lost or repeated, bit-equal where comparable."""
    measured = result("reliability.json")
    _, text, _ = re.split("<!-- /?matrix -->", (ROOT / "docs" / "reliability.md").read_text())
    cells = measured["matrix"]
    same_ranks = [cell for cell in cells if cell["bit_equal"] is not None]
    counts = [int(number) for number in re.findall(r"\d+", text.partition("\n|")[0])]
    assert counts == [
        len(cells),
        sum(cell["outcome"] == "finished" for cell in cells),
        sum(cell["samples_lost"] for cell in cells),
        sum(cell["samples_repeated"] for cell in cells),
        sum(cell["bit_equal"] for cell in same_ranks),
        len(same_ranks),
        sum(cell["footprint_equal"] for cell in same_ranks),
    ]
    head, *rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    moments = [cell.strip() for cell in head.split("|")[1:]]
    shown = {}
    for row in rows[1:]:
        fault, *columns = (cell.strip() for cell in row.split("|"))
        for moment, column in zip(moments, columns, strict=True):
            ranks = [] if column == "–" else column.split(", ")
            shown |= {(fault, moment, int(rank.strip("~").split("→")[0])): "~~" not in rank for rank in ranks}
    assert shown == {
        (cell["fault"], cell["moment"], cell["ranks"]): cell["outcome"] == "finished"
        and cell["bit_equal"] is not False
        and cell["samples_lost"] == cell["samples_repeated"] == 0
        for cell in cells
    }


def test_the_planner_was_right_to_the_byte() -> None:
    """The planner's table: five networks, three boundaries each, in whole MiB."""
    records = result("planner_accuracy.json")["records"]
    assert all(record["planned_bytes"] == record["measured_bytes"] for record in records)
    text = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^(\| network, batch 8 .*\n(?:\|.*\n)+)", text, re.MULTILINE)
    shown = [
        (int(boundary), size)
        for _, *cells in rows_of(table)
        for boundary, size in zip(cells[::2], cells[1::2], strict=True)
    ]
    measured = [(record["boundary"], f"{record['measured_bytes'] / MIB:.0f} MiB") for record in records]
    assert shown == measured
    assert len(records) == 15
