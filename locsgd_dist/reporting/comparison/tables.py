"""The comparison's tables as text: for people, in HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Callable

from locsgd_dist.formatting import MISSING, format_bytes, format_count, format_duration
from locsgd_dist.reporting.comparison.comparison import Comparison
from locsgd_dist.reporting.comparison.grouping import Benchmark
from locsgd_dist.reporting.comparison.paper import COLUMNS, Cell, PaperTable, percent
from locsgd_dist.reporting.comparison.statistics import Summary
from locsgd_dist.reporting.summary import Table

NOT_RUN = "not run"
_TRAFFIC = ("gradient_bytes", "replica_bytes", "exchanged_bytes", "plain_ddp_bytes")
_SI = ("", "k", "M", "G", "T", "P", "E", "Z")
_COST_NAMES = {"flops": "FLOPs", "seconds": "time", "cpu_seconds": "CPU time"}


def variant_table(comparison: Comparison, benchmark: Benchmark) -> Table:
    """Accuracy and what it cost, a row per variant."""
    columns: list[tuple[str, str, Callable[[Summary, int], str]]] = [
        ("Top-1 error", "final_error", error_text),
        ("Best error", "best_error", error_text),
        ("vs baseline", "error_increase", points_text),
        ("Time", "seconds", duration_text),
        ("Speed-up", "speed_up", factor_text),
        ("CPU time", "cpu_seconds", duration_text),
        ("CPU speed-up", "cpu_speed_up", factor_text),
        ("FLOPs", "flops", flops_text),
        ("Fewer FLOPs", "flops_ratio", factor_text),
    ]
    rows = []
    for variant in benchmark.variants:
        figures, n = comparison.figures.of(variant), len(variant.runs)
        name = f"{variant.name} (baseline)" if variant is benchmark.baseline else variant.name
        rows.append(
            [name, variant.traits.strategy, str(n), variant.epochs_text]
            + [text(figures[key], n) for _, key, text in columns]
        )
    return Table.of(["Variant", "Strategy", "Seeds", "Epochs", *(heading for heading, _, _ in columns)], rows)


def resource_table(comparison: Comparison, benchmark: Benchmark) -> Table:
    """Boundary, memory and traffic, a row per variant."""
    columns: list[tuple[str, str, Callable[[Summary, int], str]]] = [
        ("Boundary at the end", "final_boundary", count_text),
        ("Footprint, first epoch", "footprint_first_bytes", bytes_text),
        ("Footprint, last epoch", "footprint_last_bytes", bytes_text),
        ("Largest footprint", "footprint_max_bytes", bytes_text),
        ("Gradients", "gradient_bytes", bytes_text),
        ("Replicas", "replica_bytes", bytes_text),
        ("Gradients and replicas", "exchanged_bytes", bytes_text),
        ("Plain DDP", "plain_ddp_bytes", bytes_text),
    ]
    rows = []
    for variant in benchmark.variants:
        figures, n = comparison.figures.of(variant), len(variant.runs)
        layers = variant.first.data.last("num_layers")
        # One rank exchanges nothing: a column of zeros would say no more.
        alone = variant.traits.num_gpus == 1
        cells = [MISSING if alone and key in _TRAFFIC else text(figures[key], n) for _, key, text in columns]
        if layers is not None and cells[0] != MISSING:
            cells[0] = f"{cells[0]} of {layers}"
        rows.append([variant.name, *cells])
    return Table.of(["Variant", *(heading for heading, _, _ in columns)], rows)


def equal_cost_table(comparison: Comparison, benchmark: Benchmark) -> Table:
    """Every variant against plain SGD at the variant's cost, a row per variant and kind of cost."""
    rows = []
    for reading in comparison.iso_cost[benchmark]:
        figures, n = comparison.figures.of(reading.variant), len(reading.variant.runs)
        rows.append(
            [
                reading.variant.name,
                _COST_NAMES[reading.cost],
                error_text(figures["final_error"], n),
                error_text(reading.sgd_error, n) if reading.sgd_error.n else "no SGD schedule so short",
                points_text(reading.advantage, n),
                error_text(reading.running_error, n),
            ]
        )
    headings = ["Variant", "At equal", "Error", "SGD schedule's error", "Advantage", "Baseline's error by then"]
    return Table.of(headings, rows)


def equal_accuracy_table(comparison: Comparison, benchmark: Benchmark) -> Table:
    """What plain SGD needs for the best accuracy of each variant, a row per variant."""
    rows = []
    for reading in comparison.iso_accuracy[benchmark]:
        n, seeds = len(reading.variant.runs), reading.num_seeds
        reached = [
            count_text(reading.baseline_epochs, seeds),
            factor_text(reading.speed_up, seeds),
            count_text(reading.schedule_epochs, seeds),
            factor_text(reading.schedule_speed_up, seeds),
        ]
        if seeds and not reading.baseline_epochs.n:
            reached[0] = "not reached"
        if seeds and not reading.schedule_epochs.n:
            reached[2] = "not reached"
        rows.append(
            [reading.variant.name, error_text(reading.error, n), count_text(reading.variant_epochs, n), *reached]
        )
    headings = [
        *("Variant", "Best error", "Its epochs"),
        *("Baseline's epochs", "Speed-up over it", "Shortest SGD schedule", "Speed-up over that"),
    ]
    return Table.of(headings, rows)


def paper_table(table: PaperTable) -> Table:
    """One of the paper's tables: each figure as printed, ours, and the difference (ours − paper)."""
    headings = ["Network", "Data", "Strategy"]
    for name in table.columns:
        headings += [f"{COLUMNS[name]}: paper", "ours", "difference"]
    headings.append("Run")
    rows = []
    for row in table.rows:
        printed = {name: _printed(name, row.columns.get(name)) for name in table.columns}
        label = f"{row.label} ({row.note})" if row.note else row.label
        start = [row.network, row.dataset, label]
        if not row.matches:
            rows.append([*start, *(cell for name in table.columns for cell in (printed[name], "", "")), NOT_RUN])
        for match in row.matches:
            cells = []
            for name in table.columns:
                cell = match.cells.get(name)
                cells += [printed[name], *_ours(name, cell, len(match.variant.runs))]
            rows.append([*start, *cells, f"{match.variant.name} (n={len(match.variant.runs)})"])
    return Table(headings, rows)


def departure_lines(table: PaperTable) -> list[str]:
    """How the runs beside a table of the paper are set up otherwise: what all share first, then each one's own."""
    of = {match.variant.name: match.departures for row in table.rows for match in row.matches}
    shared = [text for text in next(iter(of.values()), ()) if all(text in texts for texts in of.values())]
    lines = [f"All runs: {', '.join(shared)}."] if shared else []
    for name, texts in of.items():
        if own := [text for text in texts if text not in shared]:
            lines.append(f"{name}: {', '.join(own)}.")
    return lines


def _printed(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:g}×" if name == "speed_up" else f"{value:g}"


def _ours(name: str, cell: Cell | None, n: int) -> tuple[str, str]:
    if cell is None or cell.ours is None or cell.ours.mean is None:
        return MISSING, MISSING
    text = f"{_spread(cell.ours, n, lambda value: f'{value:.2f}')}{'×' if name == 'speed_up' else ''}"
    return text, MISSING if cell.difference is None else _signed(cell.difference)


def error_text(error: Summary, n: int) -> str:
    """A fraction in percent: ``40.69 ± 0.37 %``."""
    return _with_unit(percent(error), n, " %")


def points_text(difference: Summary, n: int) -> str:
    """A difference of fractions in percentage points, signed."""
    points = percent(difference)
    if points.mean is None:
        return MISSING
    return _signed(points.mean) + _spread(points, n, lambda value: f"{value:.2f}").removeprefix(f"{points.mean:.2f}")


def factor_text(factor: Summary, n: int) -> str:
    return _with_unit(factor, n, "×")


def count_text(count: Summary, n: int) -> str:
    return _spread(count, n, lambda value: f"{value:.1f}".removesuffix(".0"))


def duration_text(seconds: Summary, n: int) -> str:
    return _spread(seconds, n, format_duration)


def bytes_text(num_bytes: Summary, n: int) -> str:
    return _spread(num_bytes, n, format_bytes)


def flops_text(flops: Summary, n: int) -> str:
    """Three significant digits: ``5.28 TFLOP``."""
    if flops.mean is None:
        return MISSING
    power = 0
    while flops.mean >= 999.5 * 1000**power and power < len(_SI) - 1:
        power += 1
    return _with_unit(Summary({s: v / 1000**power for s, v in flops.per_seed.items()}), n, f" {_SI[power]}FLOP")


def _with_unit(summary: Summary, n: int, unit: str) -> str:
    text = _spread(summary, n, lambda value: f"{value:.2f}")
    if text == MISSING:
        return text
    number, bracket, rest = text.partition(" (n=")
    return f"{number}{unit}{bracket}{rest}"


def _spread(summary: Summary, n: int, text: Callable[[float], str]) -> str:
    """``mean ± sd``, with its own n where that is not the variant's; no deviation where all seeds agree."""
    if summary.mean is None:
        return MISSING
    parts = text(summary.mean)
    if summary.sd:
        parts += f" ± {text(summary.sd)}"
    return parts if summary.n == n else f"{parts} (n={summary.n})"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def markdown(table: Table) -> str:
    """A pipe table."""
    rows = [table.headings, ["---"] * len(table.headings), *table.rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def run_table(comparison: Comparison) -> Table:
    """Every run that takes part."""
    rows = [
        [
            run.name,
            variant.name,
            str(run.seed),
            format_count(run.config.train.epochs),
            error_text(Summary.of({0: comparison.figures.of_run[run]["final_error"]}), 1),
            format_duration(comparison.figures.of_run[run]["seconds"]),
        ]
        for benchmark in comparison.benchmarks
        for variant in benchmark.variants
        for run in variant.runs
    ]
    return Table.of(["Run", "Variant", "Seed", "Epochs", "Top-1 error", "Time"], rows)
