"""Data parallelism that follows the boundary: gradients of the SGD region, replicas of the localized one."""

from locsgd_dist.distributed.alignment import Alignment
from locsgd_dist.distributed.buckets import bucket_mib
from locsgd_dist.distributed.buffers import pool_buffers, pool_states, refuse_synchronised_norms
from locsgd_dist.distributed.delayed_max import DelayedMax
from locsgd_dist.distributed.kept_outputs import KeptOutputs, Recurrence
from locsgd_dist.distributed.refresh import Refresh
from locsgd_dist.distributed.region_ddp import RegionDDP
from locsgd_dist.distributed.replicas import ReplicaConfig, Replicas, make_replicas
from locsgd_dist.distributed.runtime import DistributedConfig, Runtime, environment_rank, resolve_device
from locsgd_dist.distributed.traffic import Traffic

__all__ = [
    "Alignment",
    "DelayedMax",
    "DistributedConfig",
    "KeptOutputs",
    "Recurrence",
    "Refresh",
    "RegionDDP",
    "ReplicaConfig",
    "Replicas",
    "Runtime",
    "Traffic",
    "bucket_mib",
    "environment_rank",
    "make_replicas",
    "pool_buffers",
    "pool_states",
    "refuse_synchronised_norms",
    "resolve_device",
]
