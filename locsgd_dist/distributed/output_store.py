"""Rows of numbers by key, shared by the processes of one machine."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class OutputStore:
    """A table of ``num_keys`` rows, empty at first, in a file that all who open its path map into their memory.

    The system writes to the file what does not fit into memory, and what one process has written the others read. Two
    may not write one row at the same time.

    Args:
        path: of the file; the first to open it makes it. Whoever removes it takes it from nobody who has it open.
        shape: of a row.

    Raises:
        OSError: there is no room for all of it; nothing is left behind then. Room is taken at once, since a write to
            a full disk through mapped memory ends the process.
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
            mapped = np.memmap(path, np.uint8, mode="r+", shape=(num_bytes + num_keys,))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(f"no room for {num_bytes / 2**30:.2f} GiB in {path.parent}: {error.strerror}") from None
        # As bytes: numpy does not know all of torch's types.
        self._rows = mapped[:num_bytes].reshape(num_keys, width)
        self._is_kept = mapped[num_bytes:]

    def has(self, keys: Tensor) -> Tensor:
        """Bool [b], which of ``keys`` (int64 [b], on the host) have a row."""
        return torch.from_numpy(self._is_kept[keys.numpy()] != 0)

    def read(self, keys: Tensor) -> Tensor:
        """[b, \\*shape] on the host, of keys that have a row."""
        return torch.from_numpy(self._rows[keys.numpy()]).view(self._dtype).view(len(keys), *self._shape)

    def write(self, keys: Tensor, rows: Tensor) -> None:
        """Keeps ``rows``, [b, \\*shape], contiguous, on any device."""
        indices = keys.numpy()
        self._rows[indices] = rows.cpu().view(len(keys), -1).view(torch.uint8).numpy()
        self._is_kept[indices] = 1


def row_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of one row."""
    return math.prod(shape) * dtype.itemsize
