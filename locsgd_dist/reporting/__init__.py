"""report.html of a run directory: the numbers that an engineer asks for first, as figures and tables in one file."""

from locsgd_dist.reporting.report import write_report

__all__ = ["write_report"]
