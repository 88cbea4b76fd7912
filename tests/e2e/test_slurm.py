"""The Slurm batch file on a real Slurm: submitted, preempted, put back into the queue, finished."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import environment, events, metrics
from slurm_cluster import ENDED, SlurmCluster, missing_for_slurm

EPOCHS = 3
TRAIN = 160
# Each of the two ranks reads 80 images an epoch. In the third it waits to be asked to leave; what goes on from there
# reads too few to wait again.
WAIT_AT = 220


@pytest.fixture
def cluster(tmp_path: Path):
    reason = missing_for_slurm()
    if reason is not None:
        pytest.skip(reason)
    (tmp_path / "slurm").mkdir()
    with SlurmCluster(tmp_path / "slurm") as cluster:
        yield cluster


def wait_until(cluster: SlurmCluster, what: str, is_so: Callable[[], bool], output: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            said = output.read_text()[-4000:] if output.exists() else "no output"
            pytest.fail(f"{what} has not come in {seconds} s\n{said}\n{cluster.logs()}")
        time.sleep(0.3)


def test_a_preempted_job_goes_back_into_the_queue_and_loses_no_sample(cluster: SlurmCluster, tmp_path: Path):
    run = tmp_path / "runs" / "with space; $(touch injected)"
    launched = cluster.run(
        *(sys.executable, "-m", "locsgd_dist.cli", "launch", "slurm", "--nodes=2", "--gpus-per-node=1"),
        *("--cpus-per-rank=1", "--sbatch=time=00:10:00"),
        *("--model.name=tiny_factories:small_vit", "--model.width=null", "--data.name=tiny_factories:faulty_blobs"),
        *(f"--data.kwargs={{train: {TRAIN}, val: 20}}", "--data.workers=0", "--batch.per_gpu=4"),
        *(f"--train.epochs={EPOCHS}", "--train.device=cpu", f"--run.dir=runs/{run.name}", "--run.resume=never"),
        "--run.report_every=null",
        cwd=tmp_path,
        environment=environment() | {"TINY_FAULTS": f"wait@{WAIT_AT}"},
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    job_id = launched.stdout.splitlines()[0].removeprefix("job: ")
    output = Path(f"{run}.slurm") / "1" / f"{job_id}.out"

    def wait(what: str, is_so: Callable[[], bool]) -> None:
        wait_until(cluster, what, is_so, output)

    recorded = run / "metrics.jsonl"
    wait("the second epoch", lambda: recorded.exists() and len(recorded.read_text().splitlines()) >= EPOCHS - 1)
    assert cluster.run("scancel", "--signal=TERM", job_id).returncode == 0
    wait("the requeue", lambda: cluster.job(job_id).get("Restarts") == "1")
    wait("the end", lambda: cluster.job(job_id).get("JobState") in ENDED)

    assert cluster.job(job_id)["JobState"] == "COMPLETED", output.read_text()[-4000:]
    assert [epoch["epoch"] for epoch in metrics(run)] == list(range(EPOCHS))
    assert [epoch["samples_seen"] for epoch in metrics(run)] == [(k + 1) * TRAIN for k in range(EPOCHS)]
    assert {epoch["world_size"] for epoch in metrics(run)} == {2}
    assert all(math.isfinite(epoch["train_loss"]) for epoch in metrics(run))
    (preempted,) = events(run, "preempt")
    (resumed,) = events(run, "resume")
    assert resumed["samples_seen"] == preempted["samples_seen"]
    assert (EPOCHS - 1) * TRAIN <= preempted["samples_seen"] < EPOCHS * TRAIN
    # Exactly where it left, not at an epoch's edge, and without the run that `never` would have moved aside.
    assert not list(run.parent.glob("*.old-*"))
    assert not (run / "preempted").exists()
    assert not (tmp_path / "injected").exists()
