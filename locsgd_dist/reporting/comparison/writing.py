"""compare.html, compare.md, compare.json, and the figures as PNGs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from locsgd_dist.recording.directory import write_atomically
from locsgd_dist.reporting import style
from locsgd_dist.reporting.comparison import tables
from locsgd_dist.reporting.comparison.as_json import to_json
from locsgd_dist.reporting.comparison.comparison import Comparison
from locsgd_dist.reporting.comparison.grouping import Benchmark
from locsgd_dist.reporting.comparison.paper import PaperTable, paper
from locsgd_dist.reporting.comparison.plots import FIGURES
from locsgd_dist.reporting.page import Card, page_template
from locsgd_dist.reporting.summary import Table

PLOTS = "compare-plots"


@dataclass(frozen=True)
class Sheet:
    """A table with its title and what its columns mean."""

    title: str
    note: str
    table: Table


@dataclass(frozen=True)
class Section:
    """A benchmark as the pages show it."""

    title: str
    note: str
    sheets: tuple[Sheet, ...]
    cards: tuple[Card, ...]


def write_files(comparison: Comparison, folder: Path, only_tables: Sequence[int] = ()) -> list[Path]:
    """Writes the three files and the plots into ``folder``, which is made if need be.

    Args:
        only_tables: numbers of the paper's tables to show in the pages; by default all, of which those without any
            run are folded away. compare.json always has all eight.

    Returns:
        The paths of compare.html, compare.md and compare.json.

    Raises:
        OSError: the folder cannot be written.
    """
    plots = folder / PLOTS
    plots.mkdir(parents=True, exist_ok=True)
    sections = [_section(comparison, benchmark, plots) for benchmark in comparison.benchmarks]
    shown = [table for table in comparison.tables if not only_tables or table.number in only_tables]
    matched = [table for table in shown if table.is_matched or only_tables]
    unmatched = [table for table in shown if table not in matched]
    content = {
        folder / "compare.html": _html(comparison, sections, matched, unmatched),
        folder / "compare.md": _markdown(comparison, sections, matched, unmatched),
        folder / "compare.json": json.dumps(to_json(comparison, folder), indent=1, ensure_ascii=False) + "\n",
    }
    for path, text in content.items():
        write_atomically(path, text)
    return list(content)


def _section(comparison: Comparison, benchmark: Benchmark, plots: Path) -> Section:
    prefix = f"{_slug(benchmark.name)}-" if len(comparison.benchmarks) > 1 else ""
    cards = []
    with style.house_style():
        for key, (title, draw) in FIGURES.items():
            drawing = draw(benchmark, comparison.figures)
            if drawing is None:
                continue
            figure, caption = drawing
            style.to_png(figure, plots / f"{prefix}{key}.png", f"{title} · {benchmark.name}")
            cards.append(
                Card(f"{prefix}{key}", title, caption, style.to_svg(figure, f"{prefix}{key}", f"{title}. {caption}"))
            )
    base = "no baseline" if benchmark.baseline is None else f"baseline {benchmark.baseline.name}"
    gpus = benchmark.variants[0].traits.num_gpus
    note = f"{len(benchmark.variants)} variants, {base}, {gpus} rank{'s' if gpus > 1 else ''}"
    return Section(benchmark.name, note, _sheets(comparison, benchmark), tuple(cards))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _sheets(comparison: Comparison, benchmark: Benchmark) -> tuple[Sheet, ...]:
    sheets = (
        Sheet(
            "Accuracy and cost",
            "Mean ± sample standard deviation over seeds. Speed-ups are ratios to the baseline's run of the same seed. "
            "Time is that of training, evaluations apart; FLOPs are those of convolutions and linear maps.",
            tables.variant_table(comparison, benchmark),
        ),
        Sheet(
            "Against plain SGD at equal cost",
            "The error of an SGD schedule that costs as much, on the line through those schedules that no other beats; "
            "advantage: that minus the variant's, in percentage points (negative: SGD is better). Last: the baseline's "
            "own run when it had spent as much, in the middle of its schedule.",
            tables.equal_cost_table(comparison, benchmark),
        ),
        Sheet(
            "Against plain SGD at equal accuracy",
            "Until the variant's best epoch: the epochs of the baseline's run to the same accuracy (the paper's "
            "reading) and the shortest SGD schedule that ends with it, each with its time over the variant's.",
            tables.equal_accuracy_table(comparison, benchmark),
        ),
        Sheet(
            "Memory and traffic",
            "Footprint: largest of the ranks. Bytes: payload per rank over the whole run.",
            tables.resource_table(comparison, benchmark),
        ),
    )
    return tuple(sheet for sheet in sheets if sheet.table.rows)


def _html(
    comparison: Comparison, sections: Sequence[Section], matched: Sequence[PaperTable], unmatched: Sequence[PaperTable]
) -> str:
    num_runs = sum(len(variant.runs) for b in comparison.benchmarks for variant in b.variants)
    return page_template("compare.html").render(
        title=", ".join(benchmark.name for benchmark in comparison.benchmarks),
        num_runs=num_runs,
        messages=comparison.messages,
        sections=sections,
        matched=[_paper_sheet(table) for table in matched],
        unmatched=[_paper_sheet(table) for table in unmatched],
        paper=paper(),
        runs=tables.run_table(comparison),
        palette=style.PALETTE | style.SERIES,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _paper_sheet(table: PaperTable) -> Sheet:
    note = " ".join(tables.departure_lines(table))
    return Sheet(
        f"Table {table.number}: {table.title}",
        f"Set up otherwise than the paper's. {note}" if note else "",
        tables.paper_table(table),
    )


def _markdown(
    comparison: Comparison, sections: Sequence[Section], matched: Sequence[PaperTable], unmatched: Sequence[PaperTable]
) -> str:
    parts = ["# Comparison"]
    if comparison.messages:
        parts.append("\n".join(f"- {message}" for message in comparison.messages))
    for section in sections:
        parts += [f"## {section.title}", f"{section.note}."]
        for sheet in section.sheets:
            parts += [f"### {sheet.title}", sheet.note, tables.markdown(sheet.table)]
        for card in section.cards:
            parts += [f"### {card.title}", f"![{card.title}]({PLOTS}/{card.key}.png)", card.caption]
    parts += ["## Beside the paper", f"Paper: {paper()['source']}; {paper()['hardware']}. Difference: ours − paper."]
    for table in matched:
        sheet = _paper_sheet(table)
        parts += [f"### {sheet.title}", tables.markdown(sheet.table), *([sheet.note] if sheet.note else [])]
    if unmatched:
        numbers = ", ".join(str(table.number) for table in unmatched)
        parts.append(f"Not run, no row of it: table {numbers} (`--table N` shows the paper's figures).")
    return "\n\n".join(parts) + "\n"
