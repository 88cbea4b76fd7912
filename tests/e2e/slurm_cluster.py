"""A Slurm cluster of two virtual hosts: real munged, slurmctld and slurmd, with state in a temporary folder."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from virtual_hosts import NODES, VirtualHosts, missing_for_virtual_hosts

# A requeued job waits until its credential has expired, 120 s by default.
# What goes wrong in a job's own daemon, slurmstepd, is said in SlurmdLogFile only.
CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost=node1
SlurmUser=root
AuthInfo=socket={state}/munge/socket,cred_expire=20
MessageTimeout=90
BatchStartTimeout=120
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmdSpoolDir={state}/spool.%n
SlurmdLogFile={logs}/jobs-%n.log
StateSaveLocation={state}/state
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=node[1-2] CPUs=8 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""
# A device that exists stands for the GPU that a job asks for; nothing opens it.
GPUS = "NodeName=node[1-2] Name=gpu File=/dev/zero\n"

# States of a job from which nothing follows by itself.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


def missing_for_slurm() -> str | None:
    """Why no cluster can be started here, or None."""
    for tool in ("slurmctld", "slurmd", "sbatch", "munged"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "slurmd has to be started by root"
    return missing_for_virtual_hosts()


class SlurmCluster(AbstractContextManager["SlurmCluster"]):
    """Started on entry, ended on exit; commands run on its first node.

    Args:
        folder: for configuration and logs; may lie as deep as it likes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._resources = ExitStack()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._hosts = VirtualHosts(folder)
        self._environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Sockets lie here (spool.node1/node1_1.4294967291), and a socket's path has at most 107 characters. TMPDIR
            # may be too deep, and so may pytest's folder, which grows with the test's name and with every session.
            short = tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True)
            state = Path(stack.enter_context(short))
            (self._folder / "slurm.conf").write_text(CONFIGURATION.format(state=state, logs=self._folder))
            (self._folder / "gres.conf").write_text(GPUS)
            stack.enter_context(self._hosts)
            self._start_munged(stack, state)
            (state / "state").mkdir()
            self._start(stack, self._hosts.on(NODES[0], ["slurmctld", "-D"]), "slurmctld")
            # A slurmd that does not reach slurmctld tries again in ever longer intervals.
            self._wait("slurmctld", lambda: self.run("scontrol", "ping").returncode == 0)
            for node in NODES:
                self._start(stack, self._hosts.on(node, ["slurmd", "-D"]), f"slurmd-{node}")
            self._wait("slurmd", lambda: self.run("sinfo", "-h", "-o", "%T %D").stdout.split() == ["idle", "2"])
            self._try_a_job()
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def run(
        self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._hosts.on(NODES[0], command),
            env=self._environment | (environment or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by its names."""
        shown = self.run("scontrol", "show", "job", job_id, "--oneliner").stdout
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(self._folder.glob("*.log")))

    def _start_munged(self, stack: ExitStack, state: Path) -> None:
        # munged refuses keys that others could read; its socket is for everybody.
        folder = state / "munge"
        folder.mkdir()
        state.chmod(0o711)
        key = folder / "key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(64))
        folder.chmod(0o711)
        files = [f"--{name}={folder}/{name}" for name in ("socket", "pid-file", "seed-file")]
        files += [f"--key-file={key}", f"--log-file={self._folder}/munged.log"]
        self._start(stack, ["munged", "--foreground", "--force", *files], "munged-start")
        self._wait("munged", lambda: self.run("munge", f"--socket={folder}/socket", "--no-input").returncode == 0)

    def _try_a_job(self) -> None:
        """A batch job with a step on either node: nothing that a test submits can fail for want of a working Slurm."""
        batch_file, output = self._folder / "probe.sh", self._folder / "probe.log"
        batch_file.write_text("#!/bin/bash\nexec srun hostname\n")
        options = (f"--nodes={len(NODES)}", "--gpus-per-node=1", "--no-requeue", f"--output={output}")
        submitted = self.run("sbatch", "--parsable", *options, str(batch_file))
        assert submitted.returncode == 0, f"{submitted.stderr}\n{self.logs()}"
        job_id = submitted.stdout.strip()
        self._wait("the end of a first job", lambda: self.job(job_id).get("JobState") in ENDED)
        assert self.job(job_id)["JobState"] == "COMPLETED", self.logs()
        assert sorted(output.read_text().split()) == list(NODES), self.logs()

    def _start(self, stack: ExitStack, command: Sequence[str], name: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._daemons[name] = process

        def end() -> None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        stack.callback(end)

    def _wait(self, what: str, is_ready: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not is_ready():
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            assert not ended, f"{ended} ended\n{self.logs()}"
            assert time.monotonic() < deadline, f"{what} is not ready after {seconds} s\n{self.logs()}"
            time.sleep(0.2)
