"""What is to be started: a checked configuration, so many nodes and ranks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from locsgd_dist.config import Config

#: The files under ``launch/``, which come with the package.
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Job:
    """A run on a cluster."""

    config: Config
    nodes: int
    gpus_per_node: int
    """0: the run uses the CPU."""
    ranks_per_node: int
    cpus_per_rank: int
    max_restarts: int
    name: str
    """Lower-case letters, digits and dashes, a letter first (RFC 1035)."""

    @property
    def cpus_per_node(self) -> int:
        return self.cpus_per_rank * self.ranks_per_node


class SubmissionError(RuntimeError):
    """The cluster's own client is missing or has refused; the message is for the user."""


def job_name(text: str, limit: int = 40) -> str:
    """``text`` as a name that Slurm and Kubernetes take: an RFC 1035 label.

    Kubernetes appends numbers of replicas to it and allows 63 characters in all, hence ``limit``.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}"
    return name[:limit].strip("-")


def submit(command: Sequence[str], *, stdin: str | None = None) -> str:
    """Runs a cluster's client and returns what it printed.

    Raises:
        SubmissionError: it is not installed, or it failed.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SubmissionError(f"{command[0]} is not installed here") from None
    if done.returncode:
        raise SubmissionError(f"{command[0]} failed: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()
