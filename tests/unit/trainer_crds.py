"""JSON schemas of Kubeflow Trainer v2's TrainJob and TrainingRuntime (trainer.kubeflow.org/v1alpha1, release 2.3).

Written from the field list of the API's Go types: every field of the parts that this project fills in, nothing else
allowed, as the API server prunes or refuses unknown fields. Fields of Kubernetes' own types (volumes, containers, pod
and job specifications) are left open here and checked against Kubernetes' schemas.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

ANY: Schema = {"type": "object"}
TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "array", "items": {"type": "string"}, "maxItems": 128}
QUANTITIES: Schema = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [
            {"type": "integer"},
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i|m)?$"},
        ]
    },
}
ENVIRONMENT: Schema = {
    "type": "array",
    "maxItems": 128,
    "items": {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": TEXT, "value": TEXT, "valueFrom": ANY},
    },
}


def fields(required: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def named_list(item: Schema, limit: int) -> Schema:
    return {"type": "array", "items": item, "maxItems": limit}


METADATA = fields(name=TEXT, namespace=TEXT, labels=ANY, annotations=ANY)
CONTAINER_PATCH = fields(("name",), name=TEXT, env=ENVIRONMENT, volumeMounts=named_list(ANY, 128), securityContext=ANY)
POD_SPEC_PATCH = fields(
    serviceAccountName=TEXT,
    volumes=named_list(ANY, 128),
    initContainers=named_list(CONTAINER_PATCH, 64),
    containers=named_list(CONTAINER_PATCH, 64),
    imagePullSecrets=named_list(ANY, 64),
    securityContext=ANY,
    nodeSelector=ANY,
    affinity=ANY,
    tolerations=named_list(ANY, 128),
    schedulingGates=named_list(ANY, 16),
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
)
REPLICATED_JOB_PATCH = fields(
    ("name",),
    name=TEXT,
    template=fields(
        metadata=METADATA,
        spec=fields(template=fields(metadata=METADATA, spec=POD_SPEC_PATCH)),
    ),
)
RUNTIME_PATCH = fields(
    ("manager",),
    # A domain, a slash and a path: the webhook refuses others.
    manager={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[\w./-]+$", "maxLength": 253},
    time=TEXT,
    trainingRuntimeSpec=fields(
        template=fields(metadata=METADATA, spec=fields(replicatedJobs=named_list(REPLICATED_JOB_PATCH, 100)))
    ),
)
TRAINER = fields(
    image={"type": "string", "maxLength": 500},
    command=TEXTS,
    args=TEXTS,
    env=ENVIRONMENT,
    numNodes={"type": "integer", "minimum": 0},
    resourcesPerNode=fields(requests=QUANTITIES, limits=QUANTITIES, claims={"type": "array", "items": ANY}),
    numProcPerNode={"type": "integer", "minimum": 1},
)
TRAIN_JOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=fields(
        ("name",),
        name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
        namespace=TEXT,
        labels=ANY,
        annotations=ANY,
    ),
    spec=fields(
        ("runtimeRef",),
        runtimeRef=fields(
            ("name",),
            name={"type": "string", "minLength": 1, "maxLength": 253},
            apiGroup=TEXT,
            kind={"enum": ["TrainingRuntime", "ClusterTrainingRuntime"]},
        ),
        initializer=ANY,
        trainer=TRAINER,
        runtimePatches=named_list(RUNTIME_PATCH, 16),
        suspend={"type": "boolean"},
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        managedBy={"enum": ["trainer.kubeflow.org/trainjob-controller", "kueue.x-k8s.io/multikueue"]},
    ),
)
REPLICATED_JOB = fields(
    ("name", "template"),
    name=TEXT,
    groupName=TEXT,
    template=fields(metadata=METADATA, spec=ANY),
    replicas={"type": "integer", "minimum": 0},
    dependsOn=named_list(ANY, 5),
)
JOB_SET = fields(
    replicatedJobs={"type": "array", "items": REPLICATED_JOB},
    network=ANY,
    successPolicy=ANY,
    failurePolicy=fields(
        maxRestarts={"type": "integer", "minimum": 0},
        restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
        rules={"type": "array", "items": ANY},
    ),
    startupPolicy=ANY,
    suspend={"type": "boolean"},
    coordinator=ANY,
    managedBy=TEXT,
    ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    volumeClaimPolicies={"type": "array", "items": ANY},
)
TRAINING_RUNTIME = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainingRuntime"},
    metadata=METADATA,
    spec=fields(
        mlPolicy=fields(
            numNodes={"type": "integer"},
            torch=fields(envInjection=ANY),
            mpi=ANY,
            flux=ANY,
            jax=ANY,
            xgboost=ANY,
        ),
        podGroupPolicy=fields(coscheduling=ANY, volcano=ANY),
        template=fields(metadata=METADATA, spec=JOB_SET),
    ),
)
