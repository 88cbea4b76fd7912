"""Buffers that ranks compute from their own share of the data, made equal before evaluation and a checkpoint."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def pool_buffers(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Gives every rank the batch-norm statistics of all ranks together, and rank 0's other buffers.

    Means are averaged; variances follow the law of total variance, ``E[var + mean^2] - E[mean]^2``, since the ranks saw
    different samples. One all-reduce and one broadcast for the whole network. All ranks call it at the same time.
    """
    if group is None:
        return
    world_size = dist.get_world_size(group)
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            assert module.running_var is not None
            means.append(module.running_mean)
            variances.append(module.running_var)
    if means:
        # Squares of means cancel against each other: double precision keeps what is left of them.
        mean = torch.cat([m.flatten() for m in means]).double()
        second_moment = torch.cat([v.flatten() for v in variances]).double() + mean.square()
        moments = torch.stack([mean, second_moment])
        dist.all_reduce(moments, group=group)
        mean, second_moment = moments / world_size
        variance = (second_moment - mean.square()).clamp_min(0)
        _scatter(mean, means)
        _scatter(variance, variances)
    pooled = {id(t) for t in (*means, *variances)}
    others = [b for b in model.buffers() if id(b) not in pooled and b.numel() > 0]
    if others:
        dist._broadcast_coalesced(group, others, 1 << 28, 0)


def _scatter(flat: Tensor, into: list[Tensor]) -> None:
    for target, values in zip(into, flat.split([t.numel() for t in into]), strict=True):
        target.copy_(values.view_as(target))
