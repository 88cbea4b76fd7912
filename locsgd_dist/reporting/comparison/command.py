"""``locsgd compare``: its options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from locsgd_dist.options import OneLineParser
from locsgd_dist.reporting.comparison.paper import NUM_TABLES

DEFAULT_OUTPUT = Path("compare")


def compare(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code.

    Raises:
        ValueError: a wrong option, or nothing to compare; one line that names it.
    """
    options = _parser().parse_args(arguments)
    from locsgd_dist.reporting.comparison.comparison import Comparison
    from locsgd_dist.reporting.comparison.writing import write_files

    comparison = Comparison.of(options.paths, options.baseline)
    for message in comparison.messages:
        print(f"locsgd compare: warning: {message}", file=sys.stderr)
    try:
        written = write_files(comparison, options.output or default_output(options.paths), options.table or ())
    except OSError as error:
        raise ValueError(f"--output must be a folder that can be written: {error}") from None
    print(*written, sep="\n")
    return 0


def default_output(paths: Sequence[Path]) -> Path:
    """The sweep directory where one is compared; else ``compare`` in the working directory."""
    if len(paths) == 1 and not (paths[0] / "config.yaml").exists():
        return paths[0]
    return DEFAULT_OUTPUT


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="locsgd compare",
        description="Compares finished runs with each other and with the paper's tables: compare.html, compare.md, "
        "compare.json. docs/compare.md says what each figure means.",
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help="run directories, or folders that hold some"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: the one sweep directory, else ./compare)"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="variant that speed-ups refer to (default: plain SGD at the most epochs)"
    )
    parser.add_argument(
        "--table",
        action="append",
        type=int,
        choices=range(1, NUM_TABLES + 1),
        metavar="N",
        help="show only this one of the paper's tables, 1 to 8; may be repeated",
    )
    return parser
