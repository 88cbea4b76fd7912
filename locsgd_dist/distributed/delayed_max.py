"""A number on which ranks agree without waiting for each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from locsgd_dist.distributed.runtime import Runtime


class DelayedMax:
    """The largest number any rank gave in the call before: its reduction runs beside the step in between.

    Every rank calls it equally often, in the same places. A world of one answers at once.
    """

    def __init__(self, runtime: Runtime):
        self._group = runtime.control_group
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def __call__(self, value: int) -> int:
        """Gives ``value`` and takes the answer to the call before; 0 at the first."""
        if self._group is None:
            return value
        answer = self.finish()
        number = torch.tensor([value])
        work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, number
        return answer

    def finish(self) -> int:
        """Waits for the reduction under way and returns its answer; 0 where there is none."""
        if self._under_way is None:
            return 0
        (work, number), self._under_way = self._under_way, None
        work.wait()
        return int(number)
