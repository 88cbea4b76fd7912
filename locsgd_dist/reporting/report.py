"""report.html: one self-contained file, and its figures as PNGs in plots/."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from locsgd_dist.recording.directory import RunDirectory, write_atomically
from locsgd_dist.reporting import layer_figures, learning_figures, resource_figures, style, summary
from locsgd_dist.reporting.drawing import FigureSpec
from locsgd_dist.reporting.page import Card, page_template
from locsgd_dist.reporting.run_data import RunData

FIGURES = (
    FigureSpec("footprint", "Footprint and batch", resource_figures.draw_footprint),
    FigureSpec("boundary", "Boundary", learning_figures.draw_boundary),
    FigureSpec("traffic", "Bytes exchanged", resource_figures.draw_traffic),
    FigureSpec("memory-trace", "Memory over wall time", resource_figures.draw_memory_trace),
    FigureSpec("accuracy", "Accuracy", learning_figures.draw_accuracy),
    FigureSpec("loss", "Loss", learning_figures.draw_loss),
    FigureSpec("throughput", "Throughput", resource_figures.draw_throughput),
    FigureSpec("learning-rate", "Learning rates", learning_figures.draw_learning_rates),
    FigureSpec("update-norm", "Update norm at the boundary", learning_figures.draw_update_norm),
    FigureSpec("layer-norm", "Norm per layer", layer_figures.draw_norm),
    FigureSpec("layer-rank", "Effective rank per layer", layer_figures.draw_effective_rank),
    FigureSpec("layer-drift", "Drift per layer", layer_figures.draw_drift),
    FigureSpec("layer-alignment", "Localized steps against the gradient", layer_figures.draw_alignment),
)
"""In the order of the page: memory, batch and traffic first, for they are what the method is about."""


def write_report(run_dir: Path, *, plots: bool = True) -> Path:
    """Writes `report.html` into the run directory and returns its path.

    What the run did not record is left out and named at the page's end. `plots=False` leaves the PNGs in `plots/` as
    they are, which halves the time. Raises FileNotFoundError if `run_dir` is no directory.
    """
    run = RunData.load(Path(run_dir))
    directory = RunDirectory(run_dir)
    cards, missing = [], []
    with style.house_style():
        for spec in FIGURES:
            drawing = spec.draw(run)
            if drawing is None:
                missing.append(spec.title)
                continue
            figure, caption = drawing
            cards.append(
                Card(spec.key, spec.title, caption, style.to_svg(figure, spec.key, f"{spec.title}. {caption}"))
            )
            if plots:
                directory.plots.mkdir(exist_ok=True)
                style.to_png(figure, directory.plots / f"{spec.key}.png", f"{spec.title} · {run.name}")
    write_atomically(directory.report, render(run, cards, missing))
    return directory.report


def render(run: RunData, cards: list[Card], missing: list[str]) -> str:
    """The page. Text of the run is escaped; only the figures' SVG stands as it is."""
    return page_template("report.html").render(
        run=run,
        cards=cards,
        missing=missing,
        palette=style.PALETTE,
        progress=summary.progress(run),
        tiles=summary.headline(run),
        settings=summary.summary(run),
        tables={
            "Events": summary.event_table(run),
            "Epochs": summary.epoch_table(run),
            "Layers": summary.layer_table(run),
        },
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
