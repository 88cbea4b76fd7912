"""Exact bytes of live tensors, counted where torch dispatches its operations.

It needs no device: on the CPU it measures a real training step (where the allocator keeps no statistics and RSS holds
its slack), on ``meta`` tensors it foretells the step of a GPU that is not there. Both see the same operations and agree
to the byte. What lies below the dispatcher is not counted: workspaces inside a kernel, a CUDA context, fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_ALLOCATION_BYTES = 512  # the CUDA caching allocator hands out multiples of this


class TensorByteTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storages while active; a context manager, which may be entered repeatedly.

    A storage counts once however many views it has, from the operation that returns it until its last owner lets it go,
    autograd's graph included. A tensor that is older than the tracker counts from the beginning: when :meth:`baseline`
    names it, or when the first operation reads it (the batch, DDP's buckets). Operations are executed as they are, so
    results do not change; DDP's reducer and collectives run on the calling thread and are seen too. Not seen are
    kernels that ``torch.compile`` generated and other threads.

    Args:
        rounding: granularity of one storage in bytes: 1 counts exactly, :data:`CUDA_ALLOCATION_BYTES` as the CUDA
            allocator would.

    Attributes:
        current_bytes: bytes alive now.
        peak_bytes: the most that was alive at once since construction or :meth:`reset_peak`.
    """

    def __init__(self, *, rounding: int = 1) -> None:
        super().__init__()
        if rounding < 1:
            raise ValueError(f"rounding must be at least 1 byte, got {rounding}")
        self.rounding = rounding
        self.current_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, _StorageRef] = {}

    def baseline(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that live already: parameters, buffers, optimizer state, gradients that are kept."""
        for tensor in tensors:
            self._note(tensor, born_now=False)

    def reset_peak(self) -> None:
        """Let the peak start again from what is alive now."""
        self.peak_bytes = self.current_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._note(value, born_now=False)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value, born_now=True)
        return result

    def _note(self, tensor: Tensor, *, born_now: bool) -> None:
        if tensor.layout is not torch.strided:
            return  # sparse and opaque layouts have no storage of their own
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the StorageImpl: meta storages have no data pointer
        num_bytes = -(-storage.nbytes() // self.rounding) * self.rounding
        known = self._live.get(key)
        if known is not None:
            change, known.num_bytes = num_bytes - known.num_bytes, num_bytes  # resize_ changes it
        else:
            change = num_bytes
            self._live[key] = _StorageRef(storage, self._forget, key, num_bytes)
            if not born_now:
                self.peak_bytes += change  # it was alive throughout what the peak has seen so far
        self.current_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _forget(self, ref: _StorageRef) -> None:
        del self._live[ref.key]
        self.current_bytes -= ref.num_bytes


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage; torch keeps the Python object until the last C++ owner is gone."""

    __slots__ = ("key", "num_bytes")

    def __new__(
        cls, storage: torch.UntypedStorage, callback: Callable[[Any], None], key: int, num_bytes: int
    ) -> _StorageRef:
        return super().__new__(cls, storage, callback)

    def __init__(
        self, storage: torch.UntypedStorage, callback: Callable[[Any], None], key: int, num_bytes: int
    ) -> None:
        super().__init__(storage, callback)
        self.key = key
        self.num_bytes = num_bytes


def saved_activation_bytes(forward: Callable[[], Any], excluded: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``, each storage counted once.

    Args:
        forward: runs the forward pass and the loss; its graph is released before this returns.
        excluded: tensors that are not activations, usually ``model.parameters()`` and ``model.buffers()``.
    """
    excluded_keys = {tensor.untyped_storage()._cdata for tensor in excluded}
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for key, storage in saved.items() if key not in excluded_keys)


def optimizer_state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of the optimizer's state: momentum, second moments, step counters."""
    return [value for state in optimizer.state.values() for value in tree_leaves(state) if isinstance(value, Tensor)]
