"""Buffers that ranks compute from their own share of the data, made equal before evaluation and a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def refuse_synchronised_norms(model: nn.Module, world_size: int) -> None:
    """Statistics are each rank's own until they are pooled; a norm that exchanges them in the forward pass would wait
    for ever for a rank that has no sample left, or whose trial step has run out of memory.

    Raises:
        ValueError: ``model`` holds such a norm and there is more than one rank.
    """
    if world_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "model.name: the network holds SyncBatchNorm, which cannot be used on several ranks here; use BatchNorm, "
            "whose statistics are pooled over ranks before each evaluation"
        )


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


def pool_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What ranks hold each for itself, as one state: weights and means averaged, variances by the law of total variance
    (see :func:`pool_buffers`), counts from rank 0.

    Args:
        states: of every rank, the same names in each.
    """
    pooled = dict(states[0]) if states else {}
    for name, first in pooled.items():
        if not first.is_floating_point():
            continue
        values = torch.stack([state[name] for state in states]).double()
        mean_name = f"{name.removesuffix('running_var')}running_mean"
        if name.endswith("running_var") and mean_name in pooled:
            means = torch.stack([state[mean_name] for state in states]).double()
            values = values + (means - means.mean(0)).square()
        pooled[name] = values.mean(0).to(first.dtype)
    return pooled


def _scatter(flat: Tensor, into: list[Tensor]) -> None:
    for target, values in zip(into, flat.split([t.numel() for t in into]), strict=True):
        target.copy_(values.view_as(target))
