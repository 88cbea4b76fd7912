"""``locsgd plan`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launching import environment

SMALL = ("--model.width=4", "--data.name=cifar10", "--data.root=nowhere", "--train.epochs=12")


def plan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locsgd_dist.cli", "plan", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def test_tables_and_figures(tmp_path: Path) -> None:
    machine = ("--gpus=4", "--gpu-memory=4MiB", "--gpu-tflops=1", "--link-gbps=10", "--plots=figures")
    done = plan(*SMALL, *machine, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("largest batch", "gradients sent", "plain DDP", "speed-up", "Not estimated:", "cuDNN"):
        assert expected in done.stdout
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert names == {
        f"{key}.png" for key in ("memory-by-boundary", "footprint", "boundary", "traffic", "throughput", "scaling")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())


def test_json_of_a_recorded_trace(tmp_path: Path) -> None:
    """Plain output is one object; the trace of a run, its network's 21 layers, and no file of the data."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"boundary": t}) + "\n" for t in (0, 4, 16)))
    done = plan(*SMALL, "--gpu-memory=1GiB", "--boundary-trace=metrics.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [record["boundary"] for record in found["boundaries"]] == list(range(17))
    batches = [record["largest_batch"] for record in found["boundaries"]]
    assert batches == sorted(batches)
    assert batches[0] > 0
    assert [epoch["boundary"] for epoch in found["schedule"]["epochs"]] == [0, 4] + 10 * [16]
    assert found["num_layers"] == 21
    assert found["assumptions"]
    assert found["not_estimated"]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = plan("--gpus=0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "locsgd: error: --gpus: must be a whole number from 1 to 4096, got '0'\n"
