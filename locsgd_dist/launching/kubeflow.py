"""A run as a TrainJob of Kubeflow Trainer v2: ``launch/kubeflow/trainjob.yaml`` with its fields filled in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from locsgd_dist.launching.job import TEMPLATES, Job, submit

RUNS = PurePosixPath("/runs")
"""Where pods see the claim for run directories."""


class _Text(str):
    """Text written line by line, as a person would."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


@dataclass(frozen=True)
class ClusterSettings:
    """What a cluster calls things."""

    image: str
    memory_per_rank: str = "32Gi"
    """Kubernetes quantity, for each rank of a pod."""
    runs_claim: str = "locsgd-runs"
    data_claim: str | None = None
    """Claim that pods see, read-only, under ``/data``."""
    runtime: str = "locsgd"
    """TrainingRuntime of the same namespace."""
    namespace: str | None = None


def run_dir_in_pod(run_dir: str) -> PurePosixPath:
    """Where a run directory lies in the pods: ``runs/NAME`` becomes ``/runs/NAME``, the claim.

    Raises:
        ValueError: an absolute path outside the claim, or one that leaves it.
    """
    path = PurePosixPath(run_dir)
    if not path.is_absolute():
        path = RUNS / (path.relative_to("runs") if path.parts[:1] == ("runs",) else path)
    if path == RUNS or not path.is_relative_to(RUNS) or ".." in path.parts:
        raise ValueError(f"run.dir must be a folder below runs/ or {RUNS}, where the pods' volume is, got {run_dir!r}")
    return path


def manifest(job: Job, cluster: ClusterSettings) -> str:
    """ConfigMap and TrainJob as YAML.

    Raises:
        ValueError: the run directory or ``run.resume`` cannot be had in a pod.
    """
    if job.config.run.resume == "never":
        raise ValueError("run.resume=never would start afresh whenever a pod is replaced; choose another run.dir")
    if job.config.run.resume != "auto":
        raise ValueError(
            f"run.resume must be auto, got {job.config.run.resume}: a file would be gone back to whenever a pod is "
            "replaced; copy it into the checkpoints of a new run.dir"
        )
    run_dir = run_dir_in_pod(job.config.run.dir)
    documents = yaml.safe_load_all(TEMPLATES.joinpath("kubeflow/trainjob.yaml").read_text(encoding="utf-8"))
    config_map, train_job = documents
    config_map["metadata"]["name"] = f"{job.name}-config"
    config = dataclasses.replace(job.config, run=dataclasses.replace(job.config.run, dir=str(run_dir)))
    config_map["data"] = {"config.yaml": _Text(config.to_yaml())}
    train_job["metadata"]["name"] = job.name
    spec = train_job["spec"]
    spec["runtimeRef"]["name"] = cluster.runtime
    _fill_trainer(spec["trainer"], job, cluster, run_dir)
    _fill_volumes(spec["runtimePatches"], job, cluster)
    for document in (config_map, train_job):
        if cluster.namespace is not None:
            document["metadata"]["namespace"] = cluster.namespace
    return yaml.dump_all([config_map, train_job], Dumper=_Dumper, sort_keys=False)


def create(text: str) -> str:
    """Hands the manifest to kubectl; returns the TrainJob's name as ``kind/name``.

    Raises:
        SubmissionError: kubectl is missing or the cluster has refused.
    """
    return submit(["kubectl", "create", "-f", "-", "-o", "name"], stdin=text).splitlines()[-1]


def _fill_trainer(trainer: dict[str, Any], job: Job, cluster: ClusterSettings, run_dir: PurePosixPath) -> None:
    trainer["image"] = cluster.image
    trainer["numNodes"] = job.nodes
    trainer["numProcPerNode"] = job.ranks_per_node
    trainer["args"] = [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)",
        f"--rdzv-id={job.name}",
        f"--max-restarts={job.max_restarts}",
        "--",
        "--config=/etc/locsgd/config.yaml",
        # Kubernetes puts variables in the place of $(NAME); a doubled dollar is a plain one.
        f"--run.dir={run_dir}".replace("$", "$$"),
    ]
    number, unit = _split_quantity(cluster.memory_per_rank)
    memory = f"{number * job.ranks_per_node}{unit}"
    limits = {"memory": memory}
    if job.gpus_per_node:
        limits["nvidia.com/gpu"] = str(job.gpus_per_node)
    trainer["resourcesPerNode"] = {"requests": {"cpu": str(job.cpus_per_node), "memory": memory}, "limits": limits}


def _fill_volumes(patches: list[dict[str, Any]], job: Job, cluster: ClusterSettings) -> None:
    (replicated_job,) = patches[0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated_job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    volumes["config"]["configMap"]["name"] = f"{job.name}-config"
    volumes["runs"]["persistentVolumeClaim"]["claimName"] = cluster.runs_claim
    if cluster.data_claim is None:
        del volumes["data"]
        container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "data"]
    else:
        volumes["data"]["persistentVolumeClaim"]["claimName"] = cluster.data_claim
    pod["volumes"] = list(volumes.values())


def _split_quantity(quantity: str) -> tuple[int, str]:
    number = quantity.rstrip("KMGTi")
    unit = quantity[len(number) :]
    if not number.isdecimal() or unit not in ("", "M", "G", "T", "Mi", "Gi", "Ti"):
        raise ValueError(f"--memory-per-rank must be a Kubernetes quantity such as 32Gi, got {quantity!r}")
    return int(number), unit


def follow_commands(name: str, namespace: str | None) -> list[str]:
    """Commands that show how the TrainJob ``name`` is doing, and end it."""
    where = f" -n {namespace}" if namespace else ""
    return [
        f"kubectl get trainjob {name}{where} --watch",
        f"kubectl logs{where} --follow --selector=jobset.sigs.k8s.io/jobset-name={name}",
        f"kubectl delete trainjob {name}{where}",
    ]


def runtime_file() -> Path:
    """The TrainingRuntime and the claim that have to be in the namespace first."""
    return TEMPLATES / "kubeflow" / "runtime.yaml"
