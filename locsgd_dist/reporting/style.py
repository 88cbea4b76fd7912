"""How figures look, and how one drawing serves a light page, a dark page, paper and a PNG.

Figures are drawn in the light colours of `PALETTE`. In the SVG that goes into the page each of them is replaced by
the CSS variable of its name, which the page sets for the scheme in force; a PNG keeps the light ones on white.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # matplotlib is imported when the first report is drawn: the start of training does not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "ink": ("#1f2329", "#e7e9ec"),
    "muted": ("#69707a", "#9aa2ad"),
    "grid": ("#e4e7eb", "#2b3138"),
    "blue": ("#2a66ad", "#6fabe8"),
    "orange": ("#c4591b", "#ee9a5f"),
    "green": ("#2e7d50", "#6fc28e"),
    "purple": ("#7a50a2", "#b899dd"),
    "red": ("#b5281f", "#f2867d"),
    "teal": ("#14808a", "#5cc3cc"),
}
"""Name → (light, dark). Blue and orange carry what is to be told apart, whatever the reader's colour vision."""

INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE, RED, TEAL = (light for light, _ in PALETTE.values())

SERIES = {
    "series-1": ("#0072b2", "#56aee0"),
    "series-2": ("#d55e00", "#f08c42"),
    "series-3": ("#009e73", "#3cc79f"),
    "series-4": ("#b5609a", "#dd93c4"),
    "series-5": ("#3d9bd4", "#8fd0f5"),
    "series-6": ("#b98500", "#e6b53c"),
    "series-7": ("#5b3f8c", "#a88fdb"),
}
"""Colours of many curves in one figure, after Okabe and Ito: told apart with any colour vision, markers aside."""

WIDTH, HEIGHT = 5.4, 3.05
"""Inches. At 72 units an inch the page shows a figure at about its natural size on a phone, larger on a desk."""

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: selectable, in the page's font
    "svg.hashsalt": "locsgd",  # same data, same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page replaces it by its own
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titley": 1.0,  # a given place spares matplotlib the search for one
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "xtick.major.size": 3,
    "lines.linewidth": 1.8,
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.1,
    "legend.borderaxespad": 0.0,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Figures made and saved inside have this module's look; the caller's own matplotlib settings come back."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(ratios: Sequence[float] = (1.0,)) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per ratio, stacked over a common horizontal axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT))
    FigureCanvasAgg(figure)
    # fixed margins: axes line up from card to card, and no layout engine has to run
    grid = figure.add_gridspec(
        len(ratios), 1, height_ratios=ratios, left=0.115, right=0.975, top=0.9, bottom=0.155, hspace=0.42
    )
    axes: list[Axes] = []
    for row in range(len(ratios)):
        axes.append(figure.add_subplot(grid[row], sharex=axes[0] if axes else None))
    for upper in axes[:-1]:
        upper.tick_params(labelbottom=False)
    return figure, axes


def name_x_axis(axes: Axes, quantity: str) -> None:
    """Says below the lowest panel what runs to the right."""
    from matplotlib.transforms import ScaledTranslation

    axes.set_xlabel(quantity)
    below = ScaledTranslation(
        0, -21 / 72, cast("Figure", axes.get_figure()).dpi_scale_trans
    )  # a fixed place: no search for one
    axes.xaxis.set_label_coords(0.5, 0, transform=axes.transAxes + below)


def name_axis(axes: Axes, quantity: str) -> None:
    """Says above the axis, not beside it, what runs upward: horizontal text reads on a phone too."""
    axes.set_title(quantity, loc="left", fontsize=9.5, color=MUTED, pad=6)


def legend(axes: Axes, num_columns: int = 4) -> None:
    """A legend on the line of the axis name, at its right end; nothing if no artist is labelled."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.025), ncols=num_columns)


def to_png(figure: Figure, path: Path, title: str) -> None:
    """Writes the figure on white, its title above it."""
    from matplotlib.transforms import Bbox

    width, height = figure.get_size_inches()
    text = figure.text(0.02, 1 + 0.09 / height, title, fontsize=12, fontweight="bold")
    box = Bbox.from_extents(0, 0, width, height + 0.35)
    figure.savefig(path, format="png", dpi=160, facecolor="white", bbox_inches=box)
    text.remove()


_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"(?<=#)(?=[mp][0-9a-f]{10}\b)")  # matplotlib's names of markers and clip paths
_FONT_FAMILY = re.compile(r"font-family: [^;]*; ?")
_COLOR_NAMES = {light: name for name, (light, _) in (PALETTE | SERIES).items()}
_COLOR = re.compile("|".join(_COLOR_NAMES))
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def to_svg(figure: Figure, key: str, label: str) -> str:
    """The figure as an <svg> element to stand inside an HTML page.

    `key` keeps its ids apart from those of the page's other figures, `label` is its alternative text. Namespaces,
    metadata, style sheets and the fixed size are left out; colours of `PALETTE` become CSS variables, and text takes
    the page's font.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.removeprefix(_SVG)
        node.text, node.tail = (node.text or "").strip(), ""
        node.attrib = {name: value for name, value in (_attribute(key, *pair) for pair in node.attrib.items()) if name}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, name: str, value: str) -> tuple[str, str]:
    """An attribute as the page has it; an empty name leaves it out."""
    match name:
        case "id":  # markers and clip paths are referred to; the names of matplotlib's artists are of no use
            return ("id", f"{key}-{value}") if _REFERENCE.search(f"#{value}") else ("", "")
        case "style":
            value = _COLOR.sub(lambda match: f"var(--{_COLOR_NAMES[match[0]]})", value)
            return name, _FONT_FAMILY.sub("", value)
        case "d":
            return name, _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.2f}", " ".join(value.split()))
        case "clip-path":
            return name, _REFERENCE.sub(f"{key}-", value)
        case _ if name == _HREF:
            return "href", _REFERENCE.sub(f"{key}-", value)
        case _:
            return name, value
