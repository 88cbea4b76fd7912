"""Launches as a user types them: torchrun in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import REMEDY, Launch, environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """``launch(*arguments, nproc=2)`` runs the trainer under torchrun in ``tmp_path`` and returns the finished process.

    ``nproc=0`` runs ``python -m locsgd_dist.train`` without torchrun. Drawing a report takes longer than such a run:
    there is none.
    """

    def run(
        *arguments: str, nproc: int = 2, max_restarts: int = 0, timeout: float = 420
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if nproc:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
            # A rank that is to leave saves first; torchrun would end it after 30 s, which a busy machine may need.
            command += [f"--max-restarts={max_restarts}", "--shutdown-timeout=120"]
        command += ["-m", "locsgd_dist.train", *arguments, "--run.report_every=null"]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment() | {REMEDY: "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
