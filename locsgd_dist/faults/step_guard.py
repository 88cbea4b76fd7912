"""Steps whose loss or gradient is not finite leave no trace, on any rank."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TooManyBadStepsError(Exception):
    """Step after step was not finite: the run would go on for ever without learning."""


class StepGuard:
    """Finds bad steps, gives batch-norm statistics back, counts.

        guard.begin(model)                       # before the forward pass
        loss = guard.watch(loss)                 # each micro-batch
        bad = guard.judge(parameters)            # after the backward pass
        ...                                      # optimizer, localized updates and tally pass over a bad step
        guard.end(bad)
        guard.check()                            # the host: is it too much?

    ``bad`` is a scalar on the device that says the same on all ranks without a collective of its own, as long as a
    layer learns by SGD: a loss that is not finite makes its gradients so, and the reduced gradient of all ranks with
    them. Nothing here waits for the device but :meth:`check`, and that for the step before.

    Args:
        device: of the network.
        group: the data group; None for a world of one.
        max_bad_steps: consecutive bad steps that stop the run.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None, *, max_bad_steps: int = 25):
        self._group = group
        self._max_bad_steps = max_bad_steps
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        #: Bad steps of the epoch, and in a row until now.
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._previous: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._reported = 0
        self._kept: list[tuple[list[Tensor], Tensor]] = []

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Remembers the running statistics of ``model``'s norms, in one copy per type."""
        self._finite.fill_(True)
        statistics = sorted(_running_statistics(model), key=lambda tensor: str(tensor.dtype))
        self._kept = []
        for _, same in groupby(statistics, key=lambda tensor: tensor.dtype):
            tensors = list(same)
            self._kept.append((tensors, torch.cat([tensor.flatten() for tensor in tensors])))

    def watch(self, loss: Tensor) -> Tensor:
        """``loss``, with a gradient that is not finite where ``loss`` is not: an overflow alone would not spread."""
        finite = loss.detach().isfinite()
        self._finite &= finite
        return loss * torch.where(finite, 1.0, torch.nan)

    @torch.no_grad()
    def judge(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Whether the step is bad, from the reduced gradients of ``parameters``; no refresh step is under way."""
        parameters = list(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        bad = ~torch.nn.utils.get_total_norm(gradients).isfinite() if gradients else torch.zeros_like(self._finite)
        if gradients and any(parameter.requires_grad for parameter in parameters):
            return bad
        # The whole network learns locally: no gradient has carried the news, but that of the part of the batch that
        # refreshed it, if one did.
        bad = (bad | ~self._finite).float()
        if self._group is not None:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self._group)
        return bad > 0

    @torch.no_grad()
    def end(self, bad: Tensor) -> None:
        """Gives the statistics of a bad step back, and counts."""
        for tensors, before in self._kept:
            now = torch.cat([tensor.flatten() for tensor in tensors])
            parts = torch.where(bad, before, now).split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
        self._kept = []
        self._counts += bad
        self._counts[1] *= bad

    def check(self) -> int:
        """Bad steps of this epoch that the host has not been told of; it learns of each one step late.

        Raises:
            TooManyBadStepsError: ``max_bad_steps`` in a row.
        """
        previous, self._previous = self._previous, self._to_host()
        return 0 if previous is None else self._report(previous)

    def finish_epoch(self) -> int:
        """As :meth:`check`, for the last step of an epoch."""
        self._previous = None
        return self._report(self._to_host())

    @property
    def num_skipped(self) -> int:
        """Bad steps of this epoch. Waits for the device."""
        return int(self._counts[0])

    def begin_epoch(self) -> None:
        self._counts[0] = 0
        self._previous = None
        self._reported = 0

    def state_dict(self) -> dict[str, int]:
        skipped, in_a_row = self._counts.tolist()
        return {"skipped": skipped, "in_a_row": in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._counts.copy_(torch.tensor([state["skipped"], state["in_a_row"]]))
        self._reported = state["skipped"]
        self._previous = None

    def _to_host(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._counts.device.type != "cuda":
            return self._counts.clone(), None
        counts = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(self._counts, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return counts, copied

    def _report(self, counted: tuple[Tensor, torch.cuda.Event | None]) -> int:
        counts, copied = counted
        if copied is not None:
            copied.synchronize()
        skipped, in_a_row = counts.tolist()
        if in_a_row >= self._max_bad_steps:
            raise TooManyBadStepsError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; look at the data and lower "
                "optim.lr or localized.lr (faults.max_bad_steps is the number allowed)"
            )
        new, self._reported = skipped - self._reported, skipped
        return new


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """What the norms of ``model`` update in a forward pass."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
        for buffer in module.buffers(recurse=False)
    ]
