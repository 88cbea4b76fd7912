"""``locsgd launch``: what it fills in, whatever the values are, and what it says when it cannot."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from launch_manifests import check_manifest

from locsgd_dist.cli import main
from locsgd_dist.config import Config, parse_config
from locsgd_dist.launching.job import Job, job_name
from locsgd_dist.launching.kubeflow import ClusterSettings, manifest, run_dir_in_pod
from locsgd_dist.launching.slurm import SlurmFiles, batch_file, fill, parse_options

HOSTILE = [
    "plain",
    "two words",
    "$(touch injected)",
    "`touch injected`",
    "a; touch injected #",
    "x & touch injected &",
    "$HOME ${HOME} !! ~ * ?",
    "(--run.dir=other)",
    "täglich – 日本",
]


@functools.cache
def parsed(*arguments: str) -> Config:
    return parse_config(["--model.width=4", *arguments])


def job(*arguments: str, gpus: int = 2, name: str = "a-run") -> Job:
    return Job(
        config=parsed(*arguments),
        nodes=3,
        gpus_per_node=gpus,
        ranks_per_node=max(1, gpus),
        cpus_per_rank=6,
        max_restarts=5,
        name=name,
    )


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with stand-ins for Slurm's commands, which write down their arguments."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {tmp_path}/srun\nexit 4\n")
    (tools / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && printf "n7\\nn8\\n" || echo "$@" > {tmp_path}/requeue\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_batch_file(text: str, folder: Path, **environment: str) -> int:
    slurm = {
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": "12",
    }
    (folder / "job.sbatch").write_text(text)
    done = subprocess.run(["bash", "job.sbatch"], cwd=folder, env=os.environ | slurm | environment, check=False)
    return done.returncode


@pytest.mark.parametrize("name", HOSTILE)
def test_the_batch_file_hands_on_any_name_as_it_is(name: str, cluster: Path):
    files = SlurmFiles(cluster / f"{name}.slurm" / "1")
    text = batch_file(job(), cluster / name, files, {})
    assert run_batch_file(text, cluster) == 4  # srun's own
    arguments = (cluster / "srun").read_text().split("\0")[:-1]
    trainer = arguments[arguments.index("locsgd_dist.train") + 1 :]
    assert trainer == [f"--config={files.config}", f"--run.dir={cluster / name}"]
    assert {"--nnodes=3", "--nproc-per-node=2", "--max-restarts=5", "--rdzv-endpoint=n7:29442"} <= set(arguments)
    assert not list(cluster.rglob("injected"))
    assert not (cluster / "requeue").exists()


def test_a_requeued_job_goes_on_whatever_it_was_told_first(cluster: Path):
    text = batch_file(job("--run.resume=never"), cluster / "r", SlurmFiles(cluster / "f"), {})
    run_batch_file(text, cluster, SLURM_RESTART_COUNT="1")
    assert (cluster / "srun").read_text().split("\0")[-2] == "--run.resume=auto"


@pytest.mark.parametrize("marker", ["new", "old", "none"])
def test_only_a_marker_of_this_start_requeues(marker: str, cluster: Path):
    (cluster / "r").mkdir()
    if marker == "old":
        (cluster / "r" / "preempted").write_text("earlier")
    if marker == "new":
        (cluster / "bin" / "srun").write_text(f"#!/bin/bash\necho now > {cluster}/r/preempted; exit 1\n")
    text = batch_file(job(), cluster / "r", SlurmFiles(cluster / "f"), {})
    assert run_batch_file(text, cluster) == (0 if marker == "new" else 4)
    assert (cluster / "requeue").exists() == (marker == "new")


def directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(found) == len(dict(found)), "an option is given twice"
    return dict(found)


def test_directives_say_what_was_asked_for(tmp_path: Path):
    options = parse_options(["partition=gpu", "time=1-12:00:00", "exclusive", "gpus-per-node=a100:2"])
    found = directives(batch_file(job(), tmp_path / "r", SlurmFiles(tmp_path / "a b"), options))
    assert found["nodes"] == "3"
    assert (found["ntasks-per-node"], found["cpus-per-task"]) == ("1", "12")
    assert found["gpus-per-node"] == "a100:2"
    assert (found["partition"], found["time"], found["exclusive"]) == ("gpu", "1-12:00:00", "")
    assert (found["signal"], found["requeue"]) == ("TERM@120", "")
    assert found["output"] == f'"{tmp_path}/a b/%j.out"'
    # All stand before the first command, where sbatch stops reading them.
    text = batch_file(job(gpus=0), tmp_path / "r", SlurmFiles(tmp_path / "f"), options)
    head, _, rest = text.partition("WORK_DIR=")
    assert "#SBATCH" not in rest
    assert "--partition=gpu" in head


def test_a_run_on_the_cpu_asks_for_no_gpus(tmp_path: Path):
    assert "gpus-per-node" not in directives(batch_file(job(gpus=0), tmp_path, SlurmFiles(tmp_path / "f"), {}))


@pytest.mark.parametrize("character", ['"', "'", "\\", "\n", "%"])
def test_paths_that_directives_cannot_hold_are_refused(character: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^run\.dir: "):
        batch_file(job(), tmp_path / "r", SlurmFiles(tmp_path / f"a{character}b"), {})


@pytest.mark.parametrize(
    "text", ["partition=a b", "x=$(y)", "comment='x'", "=3", "a=b\n#SBATCH --nodes=9", "-N", "Time=3"]
)
def test_options_of_sbatch_that_need_quotes_are_refused(text: str):
    with pytest.raises(ValueError, match="--sbatch must be KEY=VALUE"):
        parse_options([text])


def test_a_template_without_a_setting_is_not_filled_in_silently():
    with pytest.raises(LookupError, match="RUN_DIR"):
        fill("#SBATCH --nodes=2\nPYTHON=python3\n", {}, {"PYTHON": "p", "RUN_DIR": "r"})


@pytest.mark.parametrize("name", HOSTILE)
def test_the_manifest_holds_any_value_as_it_is(name: str):
    kwargs = {"text": name, "tricky": "a: b\n- c\n---\n'\"%x\t", "yes": "no", "number": "1e3"}
    launched = job()
    config = replace(
        launched.config,
        run=replace(launched.config.run, dir=f"runs/{name}"),
        data=replace(launched.config.data, root=name),
        model=replace(launched.config.model, kwargs=kwargs),
    )
    objects = check_manifest(
        manifest(replace(launched, config=config), ClusterSettings(image="registry/i:1", data_claim="d"))
    )
    inside = yaml.safe_load(objects["ConfigMap"]["data"]["config.yaml"])
    expected = asdict(config)
    expected["run"]["dir"] = f"/runs/{name}"
    assert inside == expected
    # Kubernetes replaces $(NAME) and turns $$ into $.
    assert objects["TrainJob"]["spec"]["trainer"]["args"][-1] == f"--run.dir=/runs/{name}".replace("$", "$$")


def test_the_manifest_says_what_was_asked_for():
    cluster = ClusterSettings("i", memory_per_rank="10Gi", runs_claim="mine", runtime="locsgd", namespace="team")
    objects = check_manifest(manifest(job(), cluster))
    trainer = objects["TrainJob"]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 2)
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "20Gi", "nvidia.com/gpu": "2"}
    assert trainer["resourcesPerNode"]["requests"] == {"cpu": "12", "memory": "20Gi"}
    assert {o["metadata"]["namespace"] for o in objects.values()} == {"team"}
    assert "claimName: mine" in yaml.safe_dump(objects["TrainJob"])
    cpu = check_manifest(manifest(job(gpus=0), cluster))["TrainJob"]["spec"]["trainer"]
    assert "nvidia.com/gpu" not in cpu["resourcesPerNode"]["limits"]


@pytest.mark.parametrize(
    ("given", "inside"),
    [("runs/a", "/runs/a"), ("a/b", "/runs/a/b"), ("/runs/x/y", "/runs/x/y")],
)
def test_run_directories_lie_on_the_claim(given: str, inside: str):
    assert str(run_dir_in_pod(given)) == inside


@pytest.mark.parametrize("given", ["/home/me/runs/a", "runs", "/runs", "runs/../../etc", "/runs/../etc", "."])
def test_run_directories_off_the_claim_are_refused(given: str):
    with pytest.raises(ValueError, match=r"^run\.dir must be a folder below"):
        run_dir_in_pod(given)


@pytest.mark.parametrize("text", [*HOSTILE, "", "42", "-", "A_Very.Long-Name" * 9, "9lives"])
def test_job_names_are_labels(text: str):
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", job_name(text))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "locsgd launch needs one of local, slurm, kubeflow first, got ''"),
        (("cloud",), "locsgd launch needs one of local, slurm, kubeflow first, got 'cloud'"),
        (("slurm",), "the following arguments are required: --gpus-per-node"),
        (("slurm", "--gpus-per-node=-1"), "--gpus-per-node: must be a whole number >= 0, got '-1'"),
        (("slurm", "--gpus-per-node=1", "--nodes=0"), "--nodes: must be a whole number >= 1, got '0'"),
        (("slurm", "--gpus-per-node=1", "--batch.per_gpus=2"), "unknown key batch.per_gpus"),
        (("slurm", "--gpus-per-node=1", "--image=x"), "unknown key image"),
        (("slurm", "--gpus-per-node=0", "--train.device=cuda"), "--gpus-per-node must be > 0 with train.device=cuda"),
        (("slurm", "--gpus-per-node=1", "--data.name=cifar10", "--data.root=none"), "data.root"),
        (("local", "--gpus-per-node=0", "--nodes=2"), "--rdzv-endpoint must name HOST:PORT"),
        (("kubeflow", "--gpus-per-node=1"), "--image must name the container image"),
        (("kubeflow", "--gpus-per-node=1", "--image=i", "--run.dir=/elsewhere"), "run.dir must be a folder below"),
        (("kubeflow", "--gpus-per-node=1", "--image=i", "--run.resume=never"), "run.resume=never would start afresh"),
        (("kubeflow", "--gpus-per-node=1", "--image=i", "--run.resume=epoch-0001.pt"), "run.resume must be auto"),
        (("kubeflow", "--gpus-per-node=1", "--image=i", "--memory-per-rank=much"), "--memory-per-rank must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "where",
    [("local", "--gpus-per-node=0"), ("slurm", "--gpus-per-node=2"), ("kubeflow", "--gpus-per-node=2", "--image=i")],
)
def test_a_dry_run_shows_all_and_does_nothing(
    where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    assert main(["launch", *where, "--model.width=4", "--run.dir=runs/r", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "runs/r" in out
    assert err == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("gpus", "devices"), [(0, ["auto", "cpu"]), (2, ["auto"])])
def test_without_gpus_a_machine_trains_on_the_cpu_whatever_it_has(
    gpus: int,
    devices: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    flags = [f"--gpus-per-node={gpus}", "--ranks-per-node=2", "--train.device=auto", "--dry-run"]
    assert main(["launch", "local", *flags]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert [word.removeprefix("--train.device=") for word in command if "--train.device" in word] == devices
    assert "--nproc-per-node=2" in command


def test_without_sbatch_the_batch_file_is_left_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for number in (1, 2):  # an earlier submission's files stay as they are
        assert main(["launch", "slurm", "--gpus-per-node=1", "--optim.lr=0.125", "--run.dir=runs/r"]) == 1
        folder = tmp_path / "runs" / "r.slurm" / str(number)
        _, err = capsys.readouterr()
        assert err == f"locsgd: sbatch is not installed here; the batch file is ready: sbatch {folder}/job.sbatch\n"
        assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 0.125
        assert f"RUN_DIR={tmp_path}/runs/r\n" in (folder / "job.sbatch").read_text()


def test_without_kubectl_the_manifest_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "kubeflow", "--gpus-per-node=1", "--image=i"]) == 1
    out, err = capsys.readouterr()
    check_manifest(out)
    assert err.startswith("locsgd: kubectl is not installed here")


def test_what_the_cluster_answers_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for tool, body in {
        "sbatch": "echo '17;cluster'",
        "kubectl": "cat > manifest; echo configmap/quickstart-config; echo trainjob.trainer.kubeflow.org/quickstart",
    }.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["launch", "slurm", "--gpus-per-node=1"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"job: 17\nrun: {tmp_path}/runs/quickstart\n")
    assert f"tail -F {tmp_path}/runs/quickstart.slurm/1/17.out" in out
    assert main(["launch", "kubeflow", "--gpus-per-node=1", "--image=i", "--namespace=team"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("job: trainjob.trainer.kubeflow.org/quickstart\nrun: /runs/quickstart on claim locsgd-runs\n")
    assert "kubectl get trainjob quickstart -n team --watch" in out
    check_manifest((tmp_path / "manifest").read_text())

    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid\npartition' >&2; exit 1\n")
    assert main(["launch", "slurm", "--gpus-per-node=1"]) == 1
    assert capsys.readouterr().err.startswith("locsgd: sbatch failed: invalid partition; the batch file is ready")
