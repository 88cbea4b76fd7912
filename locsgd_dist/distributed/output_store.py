"""Rows of numbers by key, shared by the processes of one machine."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class OutputStore:
    """A table of ``num_keys`` rows, empty at first, in a file that all who open its path map into their memory.

    The system writes to the file what does not fit into memory, and what one process has written the others read. Two
    may not write one row at the same time. The file may lose its name once all have it open; its room is given back
    with the last of them. Processes forked from them do not have it.

    Args:
        path: of the file; the first to open it makes it.
        shape: of a row.

    Raises:
        OSError: there is no room for all of it. Room is taken at once, since a write to a full disk through mapped
            memory ends the process.
    """

    def __init__(self, path: Path, num_keys: int, shape: Sequence[int], dtype: torch.dtype):
        self._shape, self._dtype = tuple(shape), dtype
        width = row_bytes(shape, dtype)
        num_bytes = num_keys * width
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(file, 0, num_bytes + num_keys)
            finally:
                os.close(file)
            mapped = torch.from_file(str(path), shared=True, size=num_bytes + num_keys, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"no room for {num_bytes / 2**30:.2f} GiB in {path.parent}: {reason}") from None
        # Workers that decode images would hold the room of a table that has been given up.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(num_bytes + num_keys), mmap.MADV_DONTFORK
        )
        # As bytes, which numpy moves: it does not know all of torch's types, and what it reads counts as no tensor of
        # the step.
        self._mapped = mapped
        self._rows = mapped.numpy()[:num_bytes].reshape(num_keys, width)
        self._is_kept = mapped.numpy()[num_bytes:]

    def has(self, keys: Tensor) -> Tensor:
        """Bool [b], which of ``keys`` (int64 [b], on the host) have a row."""
        return torch.from_numpy(self._is_kept[keys.numpy()] != 0)

    def read(self, keys: Tensor) -> Tensor:
        """``[b, *shape]`` on the host, of keys that have a row."""
        return torch.from_numpy(self._rows[keys.numpy()]).view(self._dtype).view(len(keys), *self._shape)

    def write(self, keys: Tensor, rows: Tensor) -> None:
        """Keeps ``rows``, ``[b, *shape]``, contiguous, on any device."""
        if not len(keys):
            return
        indices = keys.numpy()
        self._rows[indices] = rows.cpu().view(len(keys), -1).view(torch.uint8).numpy()
        self._is_kept[indices] = 1


def row_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of one row."""
    return math.prod(shape) * dtype.itemsize
