"""Runs compared with each other, with plain SGD at equal cost, and with the paper's tables."""

from collections.abc import Sequence
from pathlib import Path

from locsgd_dist.reporting.comparison.comparison import Comparison
from locsgd_dist.reporting.comparison.writing import write_files

__all__ = ["Comparison", "write_comparison", "write_files"]


def write_comparison(paths: Sequence[Path], folder: Path, *, baseline: str | None = None) -> Path:
    """Compares the finished runs among and below ``paths``; writes the three files and the plots into ``folder``.

    Returns:
        The path of compare.html.

    Raises:
        ValueError: as :meth:`Comparison.of`.
        OSError: the folder cannot be written.
    """
    return write_files(Comparison.of(paths, baseline), folder)[0]
