"""Carries a plan out as Slurm job arrays, through submitit: an array for each wave of runs whose needs are met."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locsgd_dist.sweeping.execution import Progress, stop_signals
from locsgd_dist.sweeping.expansion import Run
from locsgd_dist.sweeping.launching import Command, Launch, RunOnNode, train_command

POLL_SECONDS = 5.0
DEFAULT_MINUTES = 24 * 60
"""Time limit of a job; a run that needs longer is stopped in good order, requeued and goes on."""
MAX_REQUEUES = 100


def make_executor(
    folder: Path, parameters: Mapping[str, Any], *, nproc: int, jobs: int | None, name: str, gpus: bool
) -> Any:
    """submitit's executor for this cluster.

    Args:
        folder: where the jobs' own files go.
        parameters: of the jobs, in submitit's names for Slurm (``partition``, ``time`` in minutes, ``account``, ...).
        jobs: most runs at once (None: as many as the cluster starts).
        gpus: whether runs use a GPU per rank.

    Raises:
        ValueError: submitit is not installed, there is no Slurm here, or a parameter is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--slurm needs submitit: pip install 'locsgd-dist[slurm]'") from None
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=MAX_REQUEUES)
    except RuntimeError as error:
        raise ValueError(f"--slurm: {' '.join(str(error).split())}") from None
    defaults: dict[str, Any] = {"job_name": name, "ntasks_per_node": 1, "nodes": 1, "signal_delay_s": 120}
    defaults["time"] = DEFAULT_MINUTES
    defaults |= {"gpus_per_node": nproc} if gpus else {"cpus_per_task": nproc}
    defaults |= {"array_parallelism": jobs} if jobs is not None else {}
    try:
        executor.update_parameters(**{**defaults, **parameters})
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"slurm: {' '.join(str(error).split())}") from None
    return executor


def run_in_waves(
    progress: Progress,
    executor: Any,
    *,
    nproc: int,
    command: Command = train_command,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Submits an array of the runs that can start, waits for it, and so on until nothing is left.

    SIGINT and SIGTERM cancel the jobs that are under way.
    """
    with stop_signals() as received:
        while progress.waiting and not received:
            launches = [
                (run, Launch(run.name, command(resolved.arguments, nproc), run.log))
                for run in progress.ready()
                if (resolved := progress.start(run)) is not None
            ]
            if not launches:
                continue
            with executor.batch():
                jobs = [executor.submit(RunOnNode(launch, nproc)) for _, launch in launches]
            print(f"submitted {len(jobs)} jobs: {jobs[0].job_id} to {jobs[-1].job_id}", flush=True)
            under_way = {job: run for job, (run, _) in zip(jobs, launches, strict=True)}
            while under_way and not received:
                for job in [job for job in under_way if job.done()]:
                    _end(progress, under_way.pop(job), job)
                time.sleep(poll_seconds if under_way else 0)
            for job in under_way:
                job.cancel()
        if received:
            progress.interrupted = received[0]


def _end(progress: Progress, run: Run, job: Any) -> None:
    try:
        progress.end(run, job.result())
    except Exception as error:  # submitit raises what the job raised, or its own types for jobs that vanished
        progress.fail(run, [f"job {job.job_id} failed: {' '.join(str(error).split())[:300]}"])
