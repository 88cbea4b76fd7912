"""Carries the runs of a plan out, as their needs are met: on this machine here, on a cluster in ``slurm``."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from locsgd_dist.formatting import format_duration, format_percent
from locsgd_dist.recording import RunDirectory
from locsgd_dist.sweeping.expansion import Plan, Run
from locsgd_dist.sweeping.launching import (
    GRACE_SECONDS,
    Command,
    Launch,
    RunProcess,
    log_tail,
    shared_environment,
    train_command,
    visible_gpus,
)
from locsgd_dist.sweeping.resolution import Resolved, State, check_existing, resolve, state_of

POLL_SECONDS = 0.2


@dataclass
class Progress:
    """What has become of the selected runs; says so line by line.

    Attributes:
        waiting: runs not yet started, in order.
        active: names of runs that are under way.
        failed: why a run did not finish, by its name; the tail of its log follows the first line.
        interrupted: the number of the signal that stopped the sweep.
        on_change: called when a run has ended.
    """

    plan: Plan
    waiting: list[Run]
    finished: set[str]
    active: set[str] = field(default_factory=set)
    failed: dict[str, list[str]] = field(default_factory=dict)
    interrupted: int | None = None
    on_change: Callable[[], None] = lambda: None
    _started: dict[str, float] = field(default_factory=dict)
    _num_before: int = 0

    @classmethod
    def of(cls, plan: Plan, on_change: Callable[[], None] = lambda: None) -> Progress:
        """All selected runs but those that are done."""
        finished = {run.name for run in plan.runs if state_of(run) is State.FINISHED}
        waiting = [run for run in plan.selected if run.name not in finished]
        return cls(plan, waiting, finished, on_change=on_change, _num_before=len(plan.selected) - len(waiting))

    def ready(self) -> list[Run]:
        """Waiting runs whose needs are met. Those whose needs can no longer be met fail here."""
        ready = []
        for run in list(self.waiting):
            needs = [need for need in self.plan.needs(run) if need.name not in self.finished]
            if lost := [need.name for need in needs if need not in self.waiting and need.name not in self.active]:
                self.fail(run, [f"not started: it needs {lost[0]}, which is not finished"])
            elif not needs:
                ready.append(run)
        return ready

    def start(self, run: Run) -> Resolved | None:
        """Takes a run off the waiting list and resolves it; None if that failed, or if another sweep over the same
        folder has finished it since."""
        try:
            resolved = resolve(self.plan, run)
            # What a run takes from others is known only now: the one that lies there may be of another length.
            check_existing(self.plan, [run])
        except ValueError as error:
            self.fail(run, [str(error)])
            return None
        if state_of(run) is State.FINISHED:
            self.waiting.remove(run)
            self.finished.add(run.name)
            print(f"{run.name}: finished by another process", flush=True)
            self.on_change()
            return None
        self.waiting.remove(run)
        self.active.add(run.name)
        self._started[run.name] = time.monotonic()
        verb = "goes on" if state_of(run) is State.UNFINISHED else "started"
        match = resolved.cost_match
        note = f", {match.epochs} epochs cost what {run.variant.cost_of} did" if match else ""
        print(f"{run.name}: {verb}{note}", flush=True)
        return resolved

    def end(self, run: Run, exit_code: int) -> None:
        """Takes note of how a run ended."""
        self.active.discard(run.name)
        if exit_code == 0 and state_of(run) is State.FINISHED:
            self.finished.add(run.name)
            took = format_duration(time.monotonic() - self._started[run.name])
            top1 = RunDirectory(run.directory).load_metrics()[-1].get("val_top1")
            print(f"{run.name}: finished in {took}, top-1 {format_percent(top1)}", flush=True)
            self.on_change()
        else:
            reason = f"ended with exit code {exit_code}" if exit_code else "stopped before its last epoch"
            self.fail(run, [reason, *log_tail(run.log)])

    def fail(self, run: Run, reason: list[str]) -> None:
        """Takes note of a run that will not finish in this sweep: why, then the tail of its log."""
        self.active.discard(run.name)
        if run in self.waiting:
            self.waiting.remove(run)
        self.failed[run.name] = reason
        print(f"{run.name}: {reason[0]}", flush=True)
        self.on_change()

    def summary(self) -> int:
        """Prints what was done; returns the exit code of the sweep."""
        num_finished = sum(run.name in self.finished for run in self.plan.selected)
        print(f"{num_finished} of {len(self.plan.selected)} runs are finished, {self._num_before} were before")
        for name, (reason, *tail) in self.failed.items():
            print(f"\n{name}: {reason}")
            for line in tail:
                print(f"    {line}")
        if self.interrupted is not None:
            print("interrupted; the same command goes on where this one stopped")
            return 128 + self.interrupted
        return 1 if self.failed else 0


def run_here(progress: Progress, *, nproc: int, jobs: int, command: Command = train_command) -> None:
    """Carries the runs out on this machine, ``jobs`` at once.

    SIGINT and SIGTERM stop the runs in good order (they leave a checkpoint where the trainer can), a second one at
    once.

    Args:
        command: from a run's arguments and its number of ranks to the command line that carries it out.

    Raises:
        ValueError: there are fewer GPUs than ``jobs * nproc``.
    """
    gpus = visible_gpus(progress.plan.variants[0].config.train.device)
    environments = [
        # One run at a time sees all GPUs and takes those of its ranks.
        shared_environment(nproc, jobs, slot, gpus if jobs > 1 else [])
        for slot in range(jobs)
    ]
    running: dict[int, tuple[Run, RunProcess]] = {}
    with stop_signals() as received:
        try:
            while not received and (running or progress.waiting):
                for slot, (run, process) in list(running.items()):
                    code = process.poll()
                    if code is not None:
                        del running[slot]
                        progress.end(run, code)
                for run in progress.ready():
                    free = [slot for slot in range(jobs) if slot not in running]
                    if not free:
                        break
                    started = _start(progress, run, environments[free[0]], lambda a: command(a, nproc))
                    if started is not None:
                        running[free[0]] = run, started
                if running:
                    time.sleep(POLL_SECONDS)
            if received:
                progress.interrupted = received[0]
                _stop([process for _, process in running.values()], received)
        finally:
            for _, process in running.values():  # none is left unless something here has failed
                process.kill()


def _start(
    progress: Progress, run: Run, environment: dict[str, str], command: Callable[[Sequence[str]], list[str]]
) -> RunProcess | None:
    resolved = progress.start(run)
    if resolved is None:
        return None
    try:
        return RunProcess(Launch(run.name, command(resolved.arguments), run.log, environment))
    except ValueError as error:
        progress.fail(run, [str(error)])
        return None


def _stop(processes: list[RunProcess], received: list[int]) -> None:
    print(f"stopping {len(processes)} runs (once more kills them)", flush=True)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        while process.poll() is None:
            if len(received) > 1 or time.monotonic() > deadline:
                process.kill()
            else:
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The stop signals received so far, which do nothing else meanwhile."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
