"""A sweep as a user types it: interrupted, taken up again, and with nothing left to do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launching import environment, events, metrics

from locsgd_dist.sweeping.command import sweep

SWEEP = {
    "name": "trial",
    "base": ["quickstart"],
    "overrides": {
        "model.width": 2,
        "data.name": "tiny_factories:faulty_blobs",
        "data.kwargs": {"train": 64, "val": 20, "size": 8},
        "data.workers": 0,
        "train.epochs": 40,
        "train.evaluate_every": 40,
        "checkpoint.every_epochs": 5,
        "run.report_every": None,
    },
    "variants": {
        "local": {"configs": ["strategies/local_static"]},
        "freezing": {"configs": ["strategies/freezing"], "trace_of": "local"},
    },
}


def test_an_interrupted_sweep_goes_on_and_a_done_one_starts_nothing(tmp_path: Path, capsys):
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    command = [sys.executable, "-m", "locsgd_dist.cli", "sweep", str(file), "--output", str(tmp_path / "out")]
    local, freezing = (tmp_path / "out" / name / "seed-0" for name in ("local", "freezing"))

    # Its first run waits in its 21st epoch until it is stopped.
    patient = environment() | {"TINY_FAULTS": f"wait@{20 * 64 + 10}"}
    said = tmp_path / "said.log"

    def log() -> str:
        return "\n".join(path.read_text()[-3000:] for path in (said, *(tmp_path / "out").rglob("*.log")))

    with said.open("w") as output:
        first = subprocess.Popen(command, env=patient, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while not list(local.glob("checkpoints/epoch-*.pt")):
        assert first.poll() is None, log()
        assert time.monotonic() < deadline, log()
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    try:
        first.wait(timeout=240)
    except subprocess.TimeoutExpired:
        first.kill()
        pytest.fail(f"the sweep does not stop\n{log()}")
    out = said.read_text()
    assert first.returncode == 128 + signal.SIGINT, out
    assert "the same command goes on" in out
    assert len(metrics(local)) < 40
    assert not freezing.exists()

    second = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=600)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "local/seed-0: goes on" in second.stdout
    assert len(events(local, "resume")) == 1
    assert [record["epoch"] for record in metrics(local)] == list(range(40))
    # The replayed boundary is the recorded one, and it did move.
    boundaries = [record["boundary"] for record in metrics(local)]
    assert [record["boundary"] for record in metrics(freezing)] == boundaries
    assert boundaries[-1] > 0
    assert (tmp_path / "out" / "compare.html").is_file()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.log")}
    assert sweep([*command[4:], "--no-report"]) == 0
    assert "2 of 2 runs are finished, 2 were before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.log")} == before
    states = [
        run["state"] for v in json.loads((tmp_path / "out/sweep.json").read_text())["variants"] for run in v["runs"]
    ]
    assert states == ["finished", "finished"]
