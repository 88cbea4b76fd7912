"""What torchrun finds in its environment, whichever way of the project it is started in."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from launch_manifests import LAUNCH, ROOT, documents, pods_as_kubernetes_sees_them

from locsgd_dist.config import parse_config
from locsgd_dist.launching.environment import launch_environment
from locsgd_dist.launching.job import Job
from locsgd_dist.launching.kubeflow import ClusterSettings, manifest

REMEDY = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# In a program's place: writes its environment down. Slurm's scontrol also has to name a host.
STAND_IN = '#!/bin/sh\nenv -0 > "$SEEN/${0##*/}"\necho host\n'
PROGRAMS = ("bash", "python", "scontrol", "srun")

Seen = Callable[..., dict[str, str]]


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    """``seen(program, *command)`` is the environment in which ``command`` starts ``program``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    inherited = {key: value for key, value in os.environ.items() if key != REMEDY}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def start(program: str, *command: str, **environment: str) -> dict[str, str]:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=inherited | {"PATH": path, "SEEN": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        written = tmp_path / program
        assert written.exists(), done.stdout + done.stderr
        return dict(item.split("=", 1) for item in written.read_text().split("\0")[:-1])

    return start


def test_the_remedy_and_the_ranks_share_of_the_cores_are_set(monkeypatch: pytest.MonkeyPatch):
    for name in (REMEDY, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    cores = len(os.sched_getaffinity(0))
    assert launch_environment(1) == {**os.environ, REMEDY: "1", "OMP_NUM_THREADS": str(cores)}
    assert launch_environment(10 * cores)["OMP_NUM_THREADS"] == "1"


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(REMEDY, "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch_environment(2) == dict(os.environ)


@pytest.mark.parametrize("command", ["train --nproc=2", "launch local --gpus-per-node=0"])
def test_the_command_line_sets_the_remedy(command: str, seen: Seen, tmp_path: Path):
    # `train` becomes the interpreter with torchrun's module, `launch local` the Bash that runs local.sh.
    arguments = [*command.split(), "--model.width=4", "--train.device=cpu"]
    script = f"import sys; from locsgd_dist.cli import main; sys.executable = {str(tmp_path / 'bin' / 'python')!r}"
    program = "bash" if "launch" in command else "python"
    assert seen(program, sys.executable, "-c", f"{script}; sys.exit(main({arguments!r}))")[REMEDY] == "1"


def test_local_sh_sets_the_remedy(seen: Seen, tmp_path: Path):
    python = str(tmp_path / "bin" / "python")
    assert seen("python", "/bin/bash", str(LAUNCH / "local.sh"), "--", PYTHON=python)[REMEDY] == "1"


def test_the_batch_file_sets_the_remedy(seen: Seen):
    slurm = {"SLURM_JOB_NODELIST": "host", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "1"}
    assert seen("srun", "/bin/bash", str(LAUNCH / "slurm.sbatch"), **slurm)[REMEDY] == "1"


def test_pods_have_the_remedy():
    config = parse_config(["--model.width=4"])
    small_job = Job(config, nodes=1, gpus_per_node=1, ranks_per_node=1, cpus_per_rank=1, max_restarts=3, name="a-run")
    runtime = documents((LAUNCH / "kubeflow" / "runtime.yaml").read_text())["TrainingRuntime"]
    job = documents(manifest(small_job, ClusterSettings(image="i")))["TrainJob"]
    pod = pods_as_kubernetes_sees_them(runtime, job)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {variable["name"]: variable["value"] for variable in container["env"]}[REMEDY] == "1"
    assert "env" not in job["spec"]["trainer"]


def test_the_image_has_the_remedy():
    *_, runtime = (ROOT / "docker" / "Dockerfile").read_text().split("\nFROM ")
    instructions = runtime.replace("\\\n", " ").splitlines()
    assignments = [shlex.split(line)[1:] for line in instructions if line.startswith("ENV ")]
    variables = dict(assignment.split("=", 1) for line in assignments for assignment in line)
    assert variables[REMEDY] == "1"
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert REMEDY not in compose["services"]["train"]["environment"]
