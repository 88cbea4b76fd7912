"""Data parallelism over the SGD region: only parameters that require a gradient are in all-reduce buckets."""

# No postponed annotations here: DDP inspects the communication hook's and wants the class, not its name.

import gc
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from locsgd_dist.distributed.buckets import bucket_mib
from locsgd_dist.distributed.traffic import Traffic


class RegionDDP:
    """Runs a network under DistributedDataParallel whose buckets follow the boundary.

    ``find_unused_parameters`` would keep sending every bucket of the localized region; only wrapping anew after a shift
    shrinks the traffic, so :meth:`refresh` does that. With one rank, or once no parameter requires a gradient, the
    network runs bare.

    Args:
        model: the network, on its device. Rank 0's weights and buffers are broadcast, here and once.
        process_group: the data group, or None for a world of one.
        traffic: counts each all-reduce's payload.
        compression: ``bf16`` sends gradients as bfloat16.
        deterministic: keeps the bucket layout of the first step. DDP rebuilds its buckets after the first backward,
            which from 3 ranks on changes the order of summation, so that a resumed run would differ in the last bit.
        skipped: set by the caller before each step, alike on every rank: parameters that the step does not use. Their
            gradients stay None and do not travel. None: every step uses all parameters.
        bucket_mib: size of all-reduce buckets; None: as the region's size asks for (:func:`bucket_mib`).
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: dist.ProcessGroup | None,
        traffic: Traffic | None = None,
        *,
        compression: str = "none",
        deterministic: bool = False,
        skipped: Set[nn.Parameter] | None = None,
        bucket_mib: int | None = None,
    ):
        self.module = model
        self.traffic = traffic if traffic is not None else Traffic()
        self._group = process_group
        self._compression = compression
        self._deterministic = deterministic
        self._skipped = skipped
        self._bucket_mib = bucket_mib
        self._ddp: DistributedDataParallel | None = None
        self._wrap(init_sync=True)
        if process_group is not None and self._ddp is None:
            # DDP refuses a network without a trainable parameter; its replicas start equal all the same.
            state = [*(p.detach() for p in model.parameters()), *model.buffers()]
            dist._broadcast_coalesced(process_group, state, 1 << 28, 0)

    def __call__(self, *args: Any) -> Any:
        return self.module(*args) if self._ddp is None else self._ddp(*args)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Gradients stay on their rank inside: all but the last of a step's micro-batches."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    @property
    def is_wrapped(self) -> bool:
        """Whether a DDP wrapper is in force (more than one rank and something to reduce)."""
        return self._ddp is not None

    def refresh(self) -> None:
        """Wraps anew after the set of parameters that require a gradient has changed.

        Every rank calls it at the same time with equal weights: nothing is broadcast (a broadcast of rank 0's tensors
        would silently overwrite replicas that differ).
        """
        self._ddp = None
        # Gradients are views into the old wrapper's buckets and would keep their storage alive.
        for parameter in self.module.parameters():
            parameter.grad = None
        gc.collect()
        self._wrap(init_sync=False)

    def _bucket_cap(self, region_bytes: int) -> int:
        return self._bucket_mib or bucket_mib(region_bytes)

    def _wrap(self, *, init_sync: bool) -> None:
        region_bytes = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
        if self._group is None or region_bytes == 0:
            return
        device = next(self.module.parameters()).device
        self._ddp = DistributedDataParallel(
            self.module,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=self._group,
            # Each rank's running statistics are its own until `pool_buffers`; a broadcast each step would cost more
            # than it gives.
            forward_sync_buffers=False,
            init_sync=init_sync,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self._bucket_cap(region_bytes),
            # On, DDP never rebuilds its buckets; on a network that uses all its parameters that is its only effect.
            # Where parameters may be skipped, it tells DDP not to wait for their gradients.
            find_unused_parameters=self._deterministic or self._skipped is not None,
        )
        hook = _counted_all_reduce(self.traffic, self._skipped)
        if self._compression == "bf16":
            hook = default_hooks.bf16_compress_wrapper(hook)
        self._ddp.register_comm_hook(self._group, hook)


def _counted_all_reduce(
    traffic: Traffic, skipped: Set[nn.Parameter] | None
) -> Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]:
    """DDP's own all-reduce, its payload added to ``traffic``; zeros in the place of skipped gradients stay at home.

    A function and not a method: DDP's reducer, which garbage collection cannot look into, holds it, and through a
    method would keep the network alive for as long as the process lives.
    """

    def all_reduce(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        if skipped:
            travelling = [
                gradient
                for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
                if parameter not in skipped
            ]
            if len(travelling) < len(bucket.parameters()):
                return _all_reduce_some(group, traffic, buffer, travelling)
        traffic.add_gradients(buffer.numel() * buffer.element_size())
        return default_hooks.allreduce_hook(group, bucket)

    return all_reduce


def _all_reduce_some(
    group: dist.ProcessGroup, traffic: Traffic, buffer: Tensor, gradients: Sequence[Tensor]
) -> torch.futures.Future[Tensor]:
    """The mean over ranks of ``gradients``, views into a bucket's ``buffer``; the rest of the buffer stays as it is."""
    if not gradients:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(dist.get_world_size(group))
    traffic.add_gradients(flat.numel() * flat.element_size())
    work = dist.all_reduce(flat, group=group, async_op=True)
    assert work is not None

    def put_back(reduced: torch.futures.Future[Any]) -> Tensor:
        parts = reduced.value()[0].split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return buffer

    return work.get_future().then(put_back)
