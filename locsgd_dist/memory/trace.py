"""``memory.csv``: one line per rank and sample, appended by all ranks of a machine to the same file."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

BYTES_COLUMNS = (
    "nvml_device_used",
    "nvml_device_reserved",
    "nvml_process_used",
    "cuda_allocated",
    "cuda_reserved",
    "cuda_peak_allocated",
    "cuda_peak_reserved",
    "host_rss",
    "host_peak_rss",
    "tensor_peak",
)
COLUMNS = ("time", "rank", *BYTES_COLUMNS)
WRITE_SECONDS = 1.0


class MemoryTrace:
    """Appends samples to a CSV file; an empty cell means that the source did not say.

    Lines are gathered for a second and written by one system call in append mode, so that ranks sharing the file do
    not tear each other's lines, and a resumed run goes on in the same file.

    Raises:
        OSError: if the file cannot be opened or, later, written.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._rank = rank
        self._lines: list[str] = []
        self._written = 0.0
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write(_csv_line(COLUMNS))  # long before any rank's first line, which waits WRITE_SECONDS
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, time: float, readings: Mapping[str, int | None]) -> None:
        """Add one sample: ``time`` in seconds since the epoch, bytes by column."""
        cells = [f"{time:.3f}", self._rank, *(readings.get(column) for column in BYTES_COLUMNS)]
        with self._lock:
            self._lines.append(_csv_line(cells))
        self._written = self._written or time
        if time - self._written >= WRITE_SECONDS:
            self._written = time
            self.flush()

    def flush(self) -> None:
        """Writes what has been gathered; from any thread."""
        with self._lock:
            lines, self._lines = self._lines, []
            if lines:
                os.write(self._file, "".join(lines).encode())

    def close(self) -> None:
        try:
            self.flush()
        finally:
            os.close(self._file)


def _csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
