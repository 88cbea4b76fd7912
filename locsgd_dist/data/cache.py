"""Decoded images kept as files, so that the next start is instant and the ranks of a machine share one copy."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Images = NDArray[np.uint8]


def cache_folder() -> Path:
    """$LOCSGD_CACHE, by default ~/.cache/locsgd."""
    return Path(os.environ.get("LOCSGD_CACHE") or Path.home() / ".cache" / "locsgd")


def fingerprint(root: Path, names: NDArray[np.bytes_], recipe: str) -> str:
    """A key that changes with any file's name, size or time of change, and with the recipe that decodes them."""
    folder = os.fsencode(root.resolve())
    digest = hashlib.sha256(b"%s\n%s\n" % (folder, recipe.encode()))
    for name in names.tolist():
        status = os.stat(os.path.join(folder, name))
        digest.update(b"%s %d %d\n" % (name, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:32]


def cached_array(key: str, make: Callable[[], Images]) -> Images:
    """The array kept under `key`; made by the first process that asks, while others wait for it.

    The result is a private mapping of the file: pages are shared by all processes that read them. Where the cache
    cannot be written, the array is made in memory and a warning logged.
    """
    path = cache_folder() / f"{key}.npy"
    if path.exists():
        return np.load(path, mmap_mode="c")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        except OSError as error:
            logger.warning("decoded images are not cached: %s", error)
            return make()
        if not path.exists():
            images = make()
            try:
                _write(path, images)
            except OSError as error:
                logger.warning("decoded images are not cached: %s", error)
                return images
    return np.load(path, mmap_mode="c")


def _write(path: Path, images: Images) -> None:
    """Write beside the place and rename: nobody ever sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            np.save(file, images)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
