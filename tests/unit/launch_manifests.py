"""What a TrainJob's manifest has to fit: the Trainer's schema, and Kubernetes' own once the runtime is merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from trainer_crds import TRAIN_JOB, TRAINING_RUNTIME

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
KUBERNETES = "1.32"

Objects = dict[str, dict[str, Any]]


def documents(text: str) -> Objects:
    """The objects of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pods_as_kubernetes_sees_them(runtime: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The batch/v1 Job that the Trainer makes: the runtime's, with the TrainJob's container and patches put in."""
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (patch,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert patch["name"] == replicated["name"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    changes = patch["template"]["spec"]["template"]["spec"]
    trainer = job["spec"]["trainer"]
    (container,), (container_changes,) = pod["containers"], changes["containers"]
    assert container["name"] == container_changes["name"]
    merged_container = container | {
        "image": trainer["image"],
        "command": trainer["command"],
        "args": trainer["args"],
        "resources": trainer["resourcesPerNode"],
        "volumeMounts": container["volumeMounts"] + container_changes["volumeMounts"],
    }
    merged = pod | changes | {"containers": [merged_container], "volumes": pod["volumes"] + changes["volumes"]}
    spec = replicated["template"]["spec"] | {"template": {"spec": merged}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": spec}


def check_manifest(text: str) -> Objects:
    """Checks a TrainJob's manifest against the schemas, together with the runtime it refers to."""
    objects = documents(text)
    runtime = documents((LAUNCH / "kubeflow" / "runtime.yaml").read_text())
    jsonschema.validate(objects["TrainJob"], TRAIN_JOB)
    jsonschema.validate(runtime["TrainingRuntime"], TRAINING_RUNTIME)
    job = pods_as_kubernetes_sees_them(runtime["TrainingRuntime"], objects["TrainJob"])
    for document in (objects["ConfigMap"], runtime["PersistentVolumeClaim"], job):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    pod = job["spec"]["template"]["spec"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["volumes"][1]["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert objects["TrainJob"]["spec"]["runtimeRef"]["name"] == runtime["TrainingRuntime"]["metadata"]["name"]
    return objects
