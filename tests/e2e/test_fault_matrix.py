"""Some cells of the fault matrix (docs/reliability.md), and random kills, on two ranks: whatever strikes, the run ends
bit-equal with one that nothing happened to, and no sample is lost or trained on twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launching import environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: Every way in which a fault ends ranks, and every moment, once.
CELLS = (
    ("SIGUSR1 to one rank", "first step"),
    ("disk full", "mid-epoch"),
    ("a rank raises", "at a shift"),
    ("kill -9, newest checkpoint torn", "at a doubling"),
    ("kill -9 of one rank", "while saving"),
    ("SIGTERM to one rank", "in evaluation"),
)


def run(script: str, folder: Path, *arguments: str) -> Any:
    """What a benchmark writes; it fails itself where a run does not pass."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments, f"--json={folder / 'result.json'}"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_cells_of_the_fault_matrix(tmp_path: Path) -> None:
    result = run("reliability.py", tmp_path, "--ranks=2", "--cells", *(f"{fault}@{moment}" for fault, moment in CELLS))
    cells = {(cell["fault"], cell["moment"]): cell for cell in result["matrix"]}
    assert cells.keys() == set(CELLS)
    for cell in cells.values():
        assert cell["outcome"] == "finished", "the fault did not go as it goes, or the run did not end"
        assert cell["bit_equal"] is True
        assert (cell["samples_lost"], cell["samples_repeated"]) == (0, 0)
        # A full disk ends nothing; any other fault takes one more start.
        assert cell["starts"] == (1 if cell["fault"] == "disk full" else 2)
        assert len(cell["resumed_at"]) == cell["starts"] - 1
    assert cells["kill -9, newest checkpoint torn", "at a doubling"]["resumed_at"] < [2 * 150]


def test_random_kills(tmp_path: Path) -> None:
    result = run("soak.py", tmp_path, "--kills=2", "--ranks=2")
    assert result["kills"] == 2
    for run_ in result["runs"]:
        assert run_["finished"]
        assert run_["bit_equal"]
        assert run_["starts"] >= len(run_["kills"]) + 1
    assert (result["samples_lost"], result["samples_repeated"]) == (0, 0)
