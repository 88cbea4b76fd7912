"""Job arrays: what is asked of Slurm, and waves of jobs carried out by submitit's executor for this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import submitit
from sweep_files import plan, stand_in

from locsgd_dist.sweeping.execution import Progress
from locsgd_dist.sweeping.launching import Launch, RunOnNode
from locsgd_dist.sweeping.slurm import make_executor, run_in_waves

VARIANTS = {
    "sgd": {"configs": ["strategies/sgd"]},
    "local": {"configs": ["strategies/local_static"]},
    "short": {"configs": ["strategies/short_sgd"], "cost_of": "local"},
    "bad": {},
    "lost": {"trace_of": "bad"},
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch) -> Path:
    """A machine with Slurm's clients: an ``sbatch`` that keeps what it is given and answers as the real one does."""
    clients = tmp_path / "clients"
    clients.mkdir()
    for name, body in (("srun", "exit 0"), ("sbatch", f'cp "$1" {clients}/submitted; echo "Submitted batch job 7"')):
        (clients / name).write_text(f"#!/bin/sh\n{body}\n")
        (clients / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{clients}:{os.environ['PATH']}")
    return clients


def test_a_wave_is_one_array_of_the_size_and_with_the_resources_asked_for(cluster: Path, tmp_path: Path):
    parameters = {"partition": "gpu", "time": 90, "account": "vision"}
    executor = make_executor(tmp_path / "slurm", parameters, nproc=4, jobs=2, name="table1", gpus=True)
    launches = [RunOnNode(Launch(name, ["true"], tmp_path / f"{name}.log"), 4) for name in "abc"]
    with executor.batch():
        jobs = [executor.submit(launch) for launch in launches]
    assert [job.job_id for job in jobs] == ["7_0", "7_1", "7_2"]
    asked = {line.strip() for line in (cluster / "submitted").read_text().splitlines() if line.startswith("#SBATCH")}
    expected = ("array=0-2%2", "gpus-per-node=4", "nodes=1", "ntasks-per-node=1", "partition=gpu", "time=90")
    assert asked >= {f"#SBATCH --{option}" for option in (*expected, "account=vision", "job-name=table1")}


def test_without_gpus_the_ranks_get_cores_and_jobs_a_day(cluster: Path, tmp_path: Path):
    executor = make_executor(tmp_path / "slurm", {}, nproc=2, jobs=None, name="a", gpus=False)
    executor.submit(RunOnNode(Launch("a", ["true"], tmp_path / "a.log"), 2))
    submitted = (cluster / "submitted").read_text()
    assert "#SBATCH --cpus-per-task=2" in submitted
    assert "#SBATCH --time=1440" in submitted
    assert "--gpus" not in submitted


def test_a_wrong_parameter_is_one_line(cluster: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^slurm: .*partitoin") as caught:
        make_executor(tmp_path, {"partitoin": "gpu"}, nproc=1, jobs=None, name="a", gpus=True)
    assert "\n" not in str(caught.value)


def test_without_slurm_it_is_said_so(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^--slurm: .*slurm"):
        make_executor(tmp_path, {}, nproc=1, jobs=None, name="a", gpus=False)


def test_runs_are_submitted_in_waves_as_their_needs_are_met(tmp_path: Path, capsys):
    p = plan(tmp_path, variants=VARIANTS)
    progress = Progress.of(p)
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    run_in_waves(progress, executor, nproc=1, command=stand_in(tmp_path, fails=["bad"]), poll_seconds=0.1)
    assert progress.summary() == 1
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("submitted")] == ["3", "1"]
    assert progress.finished == {"sgd/seed-0", "local/seed-0", "short/seed-0"}
    reason, *tail = progress.failed["bad/seed-0"]
    assert (reason, tail[-1]) == ("ended with exit code 3", "no such luck")
    assert progress.failed["lost/seed-0"] == ["not started: it needs bad/seed-0, which is not finished"]


def test_a_job_whose_time_is_up_stops_its_run_and_asks_to_be_requeued(tmp_path: Path):
    log = tmp_path / "a.log"
    script = f"trap 'touch {tmp_path}/stopped; exit 0' TERM; touch {tmp_path}/started; while :; do sleep 0.05; done"
    work = RunOnNode(Launch("a", ["sh", "-c", script], log), 1)
    work.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, f"the run does not start\n{log.read_text()}"
        time.sleep(0.02)
    again = work.checkpoint()
    assert (tmp_path / "stopped").exists()
    assert again.function == RunOnNode(work.launch, 1)
    assert work.wait() == 0
