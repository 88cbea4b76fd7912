"""A checkpoint file: written whole or not at all, checked against its own checksum, no pickle executed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

# Behind the archive, so that file and checksum are replaced in one rename; torch.load and unzip pass over it.
_TRAILER = b"\nlocsgd-sha256 %s\n"
_TRAILER_PATTERN = re.compile(rb"\nlocsgd-sha256 ([0-9a-f]{64})\n\Z")
_TRAILER_BYTES = len(_TRAILER % (b"0" * 64))

# What a network file system says when a server is away for a moment: no reason to go back to an older checkpoint.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
_PAUSES = (1.0, 5.0)


def save_atomically(state: Any, path: Path) -> None:
    """Writes ``state`` so that ``path`` holds either what it held before or all of it, whenever the machine stops.

    Raises:
        OSError: the disk is full, or will not take it; ``path`` is as it was and no part is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        # Exclusive, so that no link laid in its way is followed.
        with temporary.open("xb") as file:
            hashing = _HashingFile(file)
            torch.save(state, cast(BinaryIO, hashing))
            hashing.finish()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load_state(path: Path, *, is_elsewhere: bool = False) -> dict[str, Any]:
    """A checkpoint's state on the CPU; tensors and plain values only. What a file system may not read at once is tried
    again, for some seconds.

    Args:
        is_elsewhere: another rank has the file before its eyes: where it is missing here, it may be on its way.

    Raises:
        ValueError: the file is missing, torn, altered or not a checkpoint.
    """
    try:
        state = _load_patiently(path, _TRANSIENT | ({errno.ENOENT} if is_elsewhere else set()))
    except Exception as error:  # a torn archive surfaces as any of half a dozen types
        raise ValueError(f"checkpoint {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"checkpoint {path} is not one of this trainer: it holds no model")
    return state


def _load_patiently(path: Path, transient: set[int]) -> Any:
    for pause in _PAUSES:
        try:
            return _load(path)
        except OSError as error:
            if error.errno not in transient:
                raise
            time.sleep(pause)
    return _load(path)


def _load(path: Path) -> Any:
    is_whole = _verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if not is_whole:
            raise
        # The archive was whole a moment ago: what torch's own reader, which is C++, did not get is the file system's.
        raise OSError(errno.EIO, f"torch could not load what matches its checksum: {error}") from error


def _verify(path: Path) -> bool:
    """Whether the archive has a checksum, which it matches; one without is left to what torch notices by itself.

    Raises:
        ValueError: it does not match.
    """
    with path.open("rb") as file:
        remaining = file.seek(0, os.SEEK_END) - _TRAILER_BYTES
        file.seek(max(0, remaining))
        found = _TRAILER_PATTERN.search(file.read())
        if found is None:
            return False
        file.seek(0)
        digest = hashlib.sha256()
        while remaining > 0:
            chunk = file.read(min(1 << 20, remaining))
            digest.update(chunk)
            remaining -= len(chunk)
    if digest.hexdigest().encode() != found[1]:
        raise ValueError("its content does not match its checksum")
    return True


class _HashingFile:
    """Hashes what it passes on. An error waits for :meth:`finish`: torch's archive writer, which is C++, would not
    survive one in the middle of a record."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: :meth:`finish` does."""

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        self._file.write(_TRAILER % self._digest.hexdigest().encode())
        self._file.flush()


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that syncs no folders
            raise
    finally:
        os.close(folder)
