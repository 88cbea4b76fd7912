"""One run as a process: its command, its environment, its log, and the lock that keeps it single."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from locsgd_dist.launching.environment import launch_environment

#: Seconds that processes get between being asked to stop and being killed: torchrun itself waits 30.
GRACE_SECONDS = 60.0
MAX_RESTARTS = 3
NODE_POLL_SECONDS = 0.5


Command = Callable[[Sequence[str], int], list[str]]


def train_command(arguments: Sequence[str], nproc: int) -> list[str]:
    """Trains with ``nproc`` ranks; more than one run under torchrun."""
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        command += [f"--max-restarts={MAX_RESTARTS}"]
    return [*command, "-m", "locsgd_dist.train", *arguments]


@dataclass(frozen=True)
class Launch:
    """What it takes to start a run, whatever starts it.

    Attributes:
        log: file that the output is appended to.
        environment: added to that of the process that starts the run.
    """

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)


class RunProcess:
    """A started run.

    Raises:
        ValueError: another process carries this run out.
    """

    def __init__(self, launch: Launch):
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        self._launch = launch
        self._lock = _lock(launch.log.with_name(f".{launch.log.stem}.lock"), launch.name)
        with launch.log.open("a", encoding="utf-8") as log:
            print(f"$ {shlex.join(launch.command)}", file=log, flush=True)
            # Its own session: Ctrl-C reaches the sweep alone, which then stops its runs in good order. The lock's
            # descriptor goes along, so that a run that outlives a killed sweep is not started a second time.
            self._process = subprocess.Popen(
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **launch.environment},
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )

    def poll(self) -> int | None:
        """The exit code, or None while the run is under way."""
        code = self._process.poll()
        if code is not None:
            self._lock.close()
        return code

    def terminate(self) -> None:
        """Asks the run to stop; torchrun passes it on to its ranks."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends all processes of the run; torchrun's ranks are in sessions of their own."""
        if self._process.poll() is None:
            for pid in [*_descendants(self._process.pid), self._process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the run has ended; raises subprocess.TimeoutExpired."""
        self._process.wait(timeout)
        code = self.poll()
        assert code is not None
        return code


@dataclass
class RunOnNode:
    """What a job does: one run, on the node that the job was given. Requeued when its time is up."""

    launch: Launch
    nproc: int

    def __call__(self) -> int:
        self.start()
        return self.wait()

    def start(self) -> None:
        environment = {**shared_environment(self.nproc, 1, 0, []), **self.launch.environment}
        self._process = RunProcess(replace(self.launch, environment=environment))

    def wait(self) -> int:
        """The exit code of the run."""
        # Polled, not waited for: checkpoint() runs in a signal handler on top of this frame and must be able to wait.
        while (code := self._process.poll()) is None:
            time.sleep(NODE_POLL_SECONDS)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit in the job when its time is up: stops the run in good order and asks to be requeued."""
        from submitit.helpers import DelayedSubmission

        self._process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(NODE_POLL_SECONDS)
        return DelayedSubmission(RunOnNode(self.launch, self.nproc))


def shared_environment(nproc: int, jobs: int, slot: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of a run beside ``jobs - 1`` others on this machine: its share of the cores, and its GPUs.

    Args:
        slot: which of the ``jobs`` places it takes.
        gpus: identifiers of the GPUs in use, empty on a machine without.

    Raises:
        ValueError: there are fewer GPUs than ranks.
    """
    environment = {
        key: value for key, value in launch_environment(nproc * jobs).items() if os.environ.get(key) != value
    }
    if gpus:
        if nproc * jobs > len(gpus):
            raise ValueError(f"--jobs {jobs} runs of {nproc} ranks need {nproc * jobs} GPUs, but there are {len(gpus)}")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * nproc : (slot + 1) * nproc])
    return environment


def visible_gpus(device: str) -> list[str]:
    """Identifiers of the GPUs that runs with ``train.device=device`` may use."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def log_tail(log: Path, lines: int = 12) -> list[str]:
    """The last lines of a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def _descendants(pid: int) -> list[int]:
    """Processes started by ``pid`` and by those in turn (Linux)."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            children += map(int, task.read_text().split())
    return [*children, *(grandchild for child in children for grandchild in _descendants(child))]


def _lock(path: Path, name: str) -> IO[str]:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"{name} is being carried out by another process") from None
    return file
