"""The files under launch/ and docker/, as they are: well-formed, and right about what a finished torchrun means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from launch_manifests import LAUNCH, ROOT, check_manifest, documents
from trainer_crds import TRAIN_JOB


def test_the_trainjob_and_its_runtime_fit_the_schemas():
    check_manifest((LAUNCH / "kubeflow" / "trainjob.yaml").read_text())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "trainer", "numProcPerNode"), "4"),
        (("spec", "podTemplateOverrides"), []),
        (("metadata", "name"), "4-gpus"),
        (("spec", "trainer", "resourcesPerNode", "limits", "memory"), "lots"),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(path: tuple[str, ...], value: Any):
    job = documents((LAUNCH / "kubeflow" / "trainjob.yaml").read_text())["TrainJob"]
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, TRAIN_JOB)


def test_pods_that_were_preempted_are_not_counted_as_failures():
    runtime = documents((LAUNCH / "kubeflow" / "runtime.yaml").read_text())["TrainingRuntime"]
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    first = job["template"]["spec"]["podFailurePolicy"]["rules"][0]
    assert first["action"] == "Ignore"
    assert first["onExitCodes"]["values"] == [75]
    # Kubernetes takes a pod failure policy with this restart policy only.
    assert job["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(name: str):
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), LAUNCH / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_in_the_dockerfile():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--failure-threshold=style", ROOT / "docker" / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# A stand-in for Python: writes down how torchrun would have been started, then does what the test says.
STAND_IN = """#!/bin/bash
printf '%s\\0' "$@" > "$SEEN/arguments"
env -0 > "$SEEN/environment"
{body}
"""


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``local(body, *arguments)`` starts local.sh with a torchrun that does ``body``."""

    def start(body: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        stand_in = tmp_path / "python"
        stand_in.write_text(STAND_IN.format(body=body))
        stand_in.chmod(0o755)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PET_", "TORCH"))}
        return subprocess.Popen(
            ["bash", LAUNCH / "local.sh", *arguments],
            cwd=tmp_path,
            env=clean | {"PYTHON": str(stand_in), "SEEN": str(tmp_path)} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def seen(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().split("\0")[:-1]


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def test_arguments_reach_torchrun_and_trainer_unchanged(local: Any, tmp_path: Path):
    hostile = ["--run.dir=a b'\"$(touch injected)`touch injected`", "--data.root=\n;x", "*", ""]
    code, _ = finished(local("exit 0", "--nproc-per-node=3", "--", *hostile))
    expected = ["-m", "torch.distributed.run", "--nproc-per-node=3", "--standalone", "-m", "locsgd_dist.train"]
    assert seen(tmp_path, "arguments") == [*expected, *hostile]
    environment = dict(item.split("=", 1) for item in seen(tmp_path, "environment"))
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environment["PET_MAX_RESTARTS"] == "3"
    assert code == 0
    assert not (tmp_path / "injected").exists()


def test_without_a_separator_all_arguments_are_the_trainers(local: Any, tmp_path: Path):
    finished(local("exit 0", "--config=quickstart"))
    assert seen(tmp_path, "arguments")[2:] == ["--standalone", "-m", "locsgd_dist.train", "--config=quickstart"]


@pytest.mark.parametrize("told_by", ["option", "environment"])
def test_on_several_machines_nothing_is_standalone(told_by: str, local: Any, tmp_path: Path):
    if told_by == "option":
        finished(local("exit 0", "--nnodes=2", "--rdzv-endpoint=a:1", "--"))
    else:
        finished(local("exit 0", "--", PET_NNODES="2", PET_NODE_RANK="1"))
    assert "--standalone" not in seen(tmp_path, "arguments")
    environment = dict(item.split("=", 1) for item in seen(tmp_path, "environment"))
    assert environment.get("PET_RDZV_CONF") == (None if told_by == "option" else "is_host=0")


MARKED = 'mkdir -p r; echo "$RANDOM$RANDOM" > r/preempted;'


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        (f"{MARKED} exit 0", 75),
        # torchrun itself says failure when it was told to stop; the marker knows better.
        (f"{MARKED} exit 1", 75),
    ],
)
def test_exit_codes_without_an_earlier_marker(body: str, expected: int, local: Any):
    assert finished(local(body, "--", "--run.dir=r"))[0] == expected


@pytest.mark.parametrize(("body", "expected"), [("exit 1", 1), (f"{MARKED} exit 1", 75), ("rm r/preempted", 0)])
def test_an_earlier_starts_marker_says_nothing_of_this_one(body: str, expected: int, local: Any, tmp_path: Path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "preempted").write_text("earlier\n")
    assert finished(local(body, "--", "--run.dir=r"))[0] == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_handed_on_and_the_end_waited_for(number: signal.Signals, local: Any, tmp_path: Path):
    saving = f"trap 'sleep 0.5; {MARKED} exit 1' TERM; touch ready; while :; do sleep 0.05; done"
    process = local(saving, "--", "--run.dir=r")
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, finished(process)
        assert time.monotonic() < deadline, "torchrun's stand-in does not start"
        time.sleep(0.02)
    process.send_signal(number)
    code, err = finished(process)
    assert code == 75
    assert "launch: preempted, start again to go on: r" in err


def test_compose_gives_a_run_its_gpus_shared_memory_and_time_to_save_itself():
    (train,) = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"].values()
    (devices,) = train["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    # What may wait in shared memory (Docker's own 64 MB do not hold it): on each of 8 GPUs two batches of each of
    # 8 workers, 64 images of 224 x 224 in float32.
    number, unit = train["shm_size"][:-2], train["shm_size"][-2:]
    assert int(number) * {"mb": 10**6, "gb": 10**9}[unit] > 8 * 2 * 8 * 64 * 3 * 224 * 224 * 4
    assert train["ipc"] == "private"  # with ipc: host, shm_size would not count
    assert train["ulimits"]["memlock"] == -1
    # Docker kills after the grace period: torchrun's own, after which it kills the ranks, has to be over by then.
    assert train["stop_signal"] == "SIGTERM"
    assert int(train["stop_grace_period"].removesuffix("s")) > int(train["environment"]["PET_SHUTDOWN_TIMEOUT"])
    # 75, the script's code for a preempted run, is a failure to Docker, and so starts it anew.
    assert train["restart"].startswith("on-failure")
    assert train["entrypoint"] == ["tini", "--", "bash", "/opt/locsgd/launch/local.sh"]
    assert (LAUNCH / "local.sh").is_file()
    assert train["command"][:2] == ["--nproc-per-node=gpu", "--"]


def test_compose_mounts_what_the_image_works_in():
    (train,) = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"].values()
    targets = dict(volume.removesuffix(":ro").rsplit(":", 1)[::-1] for volume in train["volumes"])
    assert set(targets) == {"/workspace/runs", "/workspace/data"}
    assert [volume.endswith(":ro") for volume in train["volumes"]] == [False, True], "data are only read"
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert "WORKDIR /workspace" in dockerfile
    assert "/opt/locsgd/launch" in dockerfile
    assert (ROOT / "docker" / train["build"]["context"] / train["build"]["dockerfile"]).resolve() == (
        ROOT / "docker" / "Dockerfile"
    )
