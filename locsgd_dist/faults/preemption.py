"""A machine that is about to be taken away says so with a signal; the run saves itself and leaves."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

from locsgd_dist.recording.directory import write_atomically

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):  # noqa: N818  not an error: the run goes on elsewhere
    """The run was asked to leave, and has saved itself if it could: the message says so."""


class StopSignals:
    """Notes SIGTERM and SIGUSR1 and does nothing else: what they ask for happens where all ranks can take part.

    A context manager that gives the signals their former handlers back. Off the main thread, where Python takes no
    signals, it notes none.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._former: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}


def write_marker(path: Path, *, epoch: int, samples_seen: int, signal: str) -> None:
    """Tells the launch script that the run left before its end and wants to be started again. A full disk is no reason
    to fail: the run has left all the same."""
    marker = {"samples_seen": samples_seen, "epoch": epoch, "time": time.time(), "signal": signal}
    try:
        write_atomically(path, json.dumps(marker) + "\n")
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)


def clear_marker(path: Path) -> None:
    """Call where a run goes on, and where it ends."""
    path.unlink(missing_ok=True)
