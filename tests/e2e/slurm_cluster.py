"""A Slurm cluster of two virtual hosts: real munged, slurmctld and slurmd, with state in a temporary folder."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from virtual_hosts import NODES, VirtualHosts, missing_for_virtual_hosts

# A requeued job waits until its credential has expired, 120 s by default.
CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost=node1
SlurmUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=20
MessageTimeout=90
BatchStartTimeout=120
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=node[1-2] CPUs=8 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""
# A device that exists stands for the GPU that a job asks for; nothing opens it.
GPUS = "NodeName=node[1-2] Name=gpu File=/dev/zero\n"


def missing_for_slurm() -> str | None:
    """Why no cluster can be started here, or None."""
    for tool in ("slurmctld", "slurmd", "sbatch", "munged"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "slurmd has to be started by root"
    return missing_for_virtual_hosts()


class SlurmCluster(AbstractContextManager["SlurmCluster"]):
    """Started on entry, ended on exit; commands run on its first node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._resources = ExitStack()
        self._hosts = VirtualHosts(folder)
        self._environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        folder = self._folder
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        (folder / "gres.conf").write_text(GPUS)
        for name in ("munge", "state"):
            (folder / name).mkdir()
        # munged refuses folders and keys that others could write or read; pytest's own are only root's.
        key = folder / "munge" / "key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(64))
        (folder / "munge").chmod(0o711)
        with ExitStack() as stack:
            stack.enter_context(self._hosts)
            munge = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
            self._start(stack, ["munged", "--foreground", "--force", f"--key-file={key}", *munge], "munged")
            self._wait("munged", (folder / "munge" / "socket").exists)
            self._start(stack, self._hosts.on(NODES[0], ["slurmctld", "-D"]), "slurmctld")
            for node in NODES:
                self._start(stack, self._hosts.on(node, ["slurmd", "-D"]), f"slurmd-{node}")
            self._wait("slurmd", lambda: self.run("sinfo", "-h", "-o", "%T %D").stdout.split() == ["idle", "2"])
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def run(
        self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._hosts.on(NODES[0], command),
            env=self._environment | (environment or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by its names."""
        shown = self.run("scontrol", "show", "job", job_id, "--oneliner").stdout
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self._folder.glob("*.log"))

    def _start(self, stack: ExitStack, command: Sequence[str], name: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

        def end() -> None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        stack.callback(end)

    def _wait(self, what: str, is_ready: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_ready():
            assert time.monotonic() < deadline, f"{what} is not ready after {seconds} s\n{self.logs()}"
            time.sleep(0.2)
