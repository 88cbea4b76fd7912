"""The documentation's figures are those of `benchmarks/results/`, rounded.

A table that shows a result stands behind a mark, `<!-- from: benchmarks/results/NAME.json -->`, and has an entry in
`EXPECTED`, which makes its cells of the JSON file; figures in running text are in `IN_TEXT`.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from documented_results import MIB, ROOT, Cells, mib, result
from speed_tables import SPEED_TABLES, at_three_quarters, ranged
from study_rows import STUDIES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_MARKED = re.compile(r"<!-- from: benchmarks/results/([\w.-]+\.json) -->\n+((?:\|.*\n)+)")


def rows_of(table: str) -> list[list[str]]:
    """Cells of a Markdown table without its head."""
    lines = [line.strip().strip("|").split("|") for line in table.strip().splitlines()]
    assert set("".join(lines[1])) <= set("-: "), "no table"
    assert {len(line) for line in lines} == {len(lines[0])}
    return [[cell.strip() for cell in line] for line in lines[2:]]


def spread(summary: dict[str, Any], digits: int, *, scale: float = 1.0, offset: float = 0.0) -> str:
    """Mean ± standard deviation over seeds of ``offset + scale * value``; of one seed, its value."""
    mean = f"{offset + scale * summary['mean']:.{digits}f}"
    return mean if summary["n"] == 1 else f"{mean} ± {abs(scale) * summary['sd']:.{digits}f}"


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


def variants(name: str) -> dict[str, dict[str, Any]]:
    """The variants of a comparison of one benchmark."""
    (benchmark,) = result(name)["benchmarks"]
    return {variant["name"]: variant for variant in benchmark["variants"]}


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


def soak() -> list[str]:
    measured = result("soak.json")
    runs = measured["runs"]
    per_ranks: Counter[int] = Counter()
    for run in runs:
        per_ranks[run["ranks"]] += len(run["kills"])
    return [
        str(number)
        for number in (
            sum(per_ranks.values()),
            max(len(run["kills"]) for run in runs),
            sum(run["bit_equal"] for run in runs),
            len(runs),
            sum(run["samples_lost"] for run in runs),
            sum(run["samples_repeated"] for run in runs),
            *(per_ranks[ranks] for ranks in (1, 2, 4)),
        )
    ]


BY_BAR = ("ResNet-18", "ResNet-34", "ResNet-50", "MobileNetV2", "VGG-13")


def added(step: dict[str, Any]) -> float:
    """Milliseconds by which replicas lengthen a step of the exchange's benchmark."""
    milliseconds: dict[str, float] = step["milliseconds"]
    return milliseconds["step"] - milliseconds["without replicas"]


def alone(network: str) -> dict[str, Any]:
    """A step with updates from an eighth of the batch, measured with nothing beside it."""
    size = 64 if network in ("ResNet-18", "VGG-13") else 32
    return at_three_quarters(f"step_time_alone_batch{size}.json")[network]["hebbian 1/8"]


def screen(rule: str) -> list[str]:
    last = result(f"screen_{rule}.json")["epochs"][-1]
    return [str(last["boundary"]), str(last["num_layers"]), f"{100 * last['val_top1']:.1f}"]


def ratio(summary: dict[str, Any]) -> list[str]:
    return [f"{summary[key]:.2f}" for key in ("median", "min", "max")]


def behind_sgd(*names: str) -> list[str]:
    """How far variants fall short of plain SGD at the same number of operations, in points."""
    found = variants("table2_small.json")
    return [spread(found[name]["iso_cost"]["flops"]["advantage"], 1, scale=-100) for name in names]


def top1_and_saving(name: str, baseline: str, variant: str, *schedules: str) -> list[str]:
    """Accuracy of plain SGD and of a variant, how many times fewer operations that needs, accuracy of ``schedules``."""
    found = variants(name)

    def top1(of: str) -> str:
        return f"{100 - 100 * found[of]['figures']['final_error']['mean']:.1f}"

    ratio = f"{found[variant]['figures']['flops_ratio']['mean']:.2f}"
    return [top1(baseline), top1(variant), ratio, *(top1(schedule) for schedule in schedules)]


def changed_about() -> list[str]:
    """Both shares of resting layers, then plain SGD for as many operations as each."""
    plain, third, saved, like_third = top1_and_saving("bench_f_swapped.json", "few-sgd", "few-finetune", "few-sgd-15")
    return [
        plain,
        third,
        saved,
        *top1_and_saving("bench_f_swapped.json", "few-sgd", "few-frozen-50")[1:],
        like_third,
        *top1_and_saving("bench_f_swapped.json", "few-sgd", "few-finetune", "few-sgd-12")[3:],
    ]


#: Page, what stands there (white space aside), and the groups that the results give.
IN_TEXT: list[tuple[str, str, Callable[[], list[str]]]] = [
    (
        "reliability.md",
        r"(\d+) kills of a random rank at a random moment, up to (\d+) in a row in one run, .* end: "
        r"(\d+) of (\d+) runs ended bit-equal with the uninterrupted one, with (\d+) samples lost and (\d+) repeated "
        r"\((\d+) kills on 1 rank, (\d+) on 2, (\d+) on 4\)",
        soak,
    ),
    (
        "../README.md",
        r"5 seeds \(`localized/finetune`\) \| ([\d.]+) % \| \*\*([\d.]+) % at ([\d.]+) × .*?\*\* \| ([\d.]+) % \|",
        lambda: top1_and_saving("bench_f_few.json", "few-sgd", "few-frozen-33", "few-sgd-15"),
    ),
    (
        "../README.md",
        r"half of the layers at rest, 5 seeds \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×, .*? \| ([\d.]+) % \|",
        lambda: top1_and_saving("bench_f_few.json", "few-sgd", "few-frozen-50", "few-sgd-12"),
    ),
    (
        "../README.md",
        r"with other classes, 5 seeds \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×; ([\d.]+) % at ([\d.]+) × "
        r"\| ([\d.]+) %; ([\d.]+) % \|",
        changed_about,
    ),
    (
        "../README.md",
        r"\(`localized/recommended`\) \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×, .*? \| ([\d.]+) to ([\d.]+) % \|",
        lambda: top1_and_saving("bench_xs.json", "sgd", "quarter-gain0.5", "sgd-16", "sgd-18"),
    ),
    (
        "../README.md",
        r"\(`localized/paper`\) \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×",
        lambda: top1_and_saving("bench_paper_5000.json", "images-5000-sgd", "images-5000-follows"),
    ),
    (
        "../README.md",
        r"\(`localized/paper_literal`\) \| ([\d.]+) % \| ([\d.]+) %:",
        lambda: top1_and_saving("bench_paper_5000.json", "images-5000-sgd", "images-5000-literal")[:2],
    ),
    (
        "performance.md",
        r"gave ([\d.]+ \S+) for ResNet-18, ([\d.]+ \S+) for ResNet-34, ([\d.]+ \S+) for ResNet-50, ([\d.]+ \S+) for "
        r"MobileNetV2 and ([\d.]+ \S+) for VGG-13, and ([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+) times",
        lambda: [
            *(ranged(alone(network)["cpu_time_over_frozen"]) for network in BY_BAR),
            *(f"{alone(network)['cpu_speed_up_over_sgd']['median']:.2f}" for network in BY_BAR),
        ],
    ),
    (
        "performance.md",
        r"then 25 MiB, the plain step takes ([\d.]+) times as long.*? With four ranks: ([\d.]+) \(([\d.–]+)\) times",
        lambda: [
            f"{result('traffic.json')['steps'][0]['step_in_default_buckets_over_step']['median']:.2f}",
            *ranged(result("traffic_ranks4.json")["steps"][0]["step_in_default_buckets_over_step"])[:-1].split(" ("),
        ],
    ),
    (
        "../README.md",
        r"(\d+) % of the exchange beside the backward pass; DDP's own buckets take ([\d.]+) × the time",
        lambda: [
            f"{100 * result('traffic.json')['steps'][0]['gradients_hidden']:.0f}",
            f"{result('traffic.json')['steps'][0]['step_in_default_buckets_over_step']['median']:.2f}",
        ],
    ),
    (
        "performance.md",
        r"(\d+) % with four ranks\), an eighth at T = 75 %",
        lambda: [f"{100 * result('traffic_ranks4.json')['steps'][0]['gradients_hidden']:.0f}"],
    ),
    (
        "performance.md",
        r"differ by (\d+) ms\. At T = 75 % (\d+) ms of replicas add (\d+) ms \((\d+) % hidden\), with four ranks (\d+) "
        r"ms add (\d+) \((\d+) %\),\s+beside gradients in bfloat16 (\d+) ms add (\d+) \((\d+) %",
        lambda: [
            f"{added(result('traffic.json')['steps'][0]):.0f}",
            *(
                figure
                for name in ("traffic.json", "traffic_ranks4.json", "traffic_bf16.json")
                for step in result(name)["steps"][-1:]
                for figure in (
                    f"{step['milliseconds']['replicas alone']:.0f}",
                    f"{added(step):.0f}",
                    f"{100 * step['replicas_hidden']:.0f}",
                )
            ),
        ],
    ),
    (
        "performance.md",
        r"at T = 75 % ([\d.]+ \([\d.–]+\)) times as long: (\d+) ms instead of (\d+), for (\d+) ms of exchange",
        lambda: [
            figure
            for step in result("refresh_exchange.json")["steps"][-1:]
            for figure in (
                ranged(step["behind_over_step"]),
                *(f"{step['milliseconds'][side]:.0f}" for side in ("behind", "step", "region alone")),
            )
        ],
    ),
    (
        "performance.md",
        r"plain step takes ([\d.]+ \([\d.–]+\)) of its\s+time by compiling .*?ΔW on an eighth ([\d.]+ \([\d.–]+\)), "
        r"frozen ([\d.]+ \([\d.–]+\))\s+times",
        lambda: [
            ranged(at_three_quarters("step_time_compiled.json")["ResNet-18"][mode]["cpu_speed_up_over_sgd"])
            for mode in ("sgd, not compiled", "hebbian 1/8", "frozen")
        ],
    ),
    ("results.md", r"\(`localized.rule=none`\) \| (\d+) of (\d+) \| ([\d.]+) % \|", lambda: screen("none")),
    ("results.md", r"η = .01 \(`hebbian`\) \| (\d+) of (\d+) \| ([\d.]+) % \|", lambda: screen("hebbian")),
    (
        "results.md",
        r"LoCal\+SGD falls ([\d.]+ ± [\d.]+) points short of it \(η = .001: ([\d.]+ ± [\d.]+), "
        r"static: ([\d.]+ ± [\d.]+)\), freezing ([\d.]+ ± [\d.]+) and random ([\d.]+ ± [\d.]+), .* "
        r"falls ([\d.]+ ± [\d.]+) short",
        lambda: behind_sgd(
            "local-dynamic", "local-dynamic-eta0.001", "local-static", "freezing", "random", "stochastic-depth"
        ),
    ),
    (
        "results.md",
        r"10 Hz trace / without = ([\d.]+) \(median; ([\d.]+) to ([\d.]+):",
        lambda: ratio(result("monitor_overhead.json")["ratio_with_trace_10hz"]),
    ),
    (
        "results.md",
        r"whose tensors are counted: ([\d.]+) \(([\d.]+) to ([\d.]+)\)",
        lambda: ratio(result("monitor_overhead.json")["ratio_measured_step"]),
    ),
    (
        "strategies.md",
        r"in turn: ([\d.]+) of its time \(median of 12 pairs, ([\d.]+)–([\d.]+)\)",
        lambda: ratio(result("stochastic_depth.json")["ratio"]),
    ),
]


@pytest.mark.parametrize(
    ("page", "pattern", "expected"), IN_TEXT, ids=[f"{page}-{number}" for number, (page, *_) in enumerate(IN_TEXT)]
)
def test_figures_in_the_text(page: str, pattern: str, expected: Callable[[], list[str]]) -> None:
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    found = re.search(pattern, text)
    assert found is not None, "the sentence is gone: take its entry out too"
    assert list(found.groups()) == expected()


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
