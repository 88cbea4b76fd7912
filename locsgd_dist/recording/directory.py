"""The files of a run directory: their names, how they are written and how they are read back."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class RunDirectory:
    """Names and readers of a run directory's files; touches the disk only where a method says so."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.memory = self.path / "memory.csv"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.preempted = self.path / "preempted"

    def move_aside(self) -> None:
        """Renames a directory that holds something to ``NAME.old-K``: starting afresh loses nothing."""
        path = self.path
        if path.is_dir() and any(path.iterdir()):
            free = (path.with_name(f"{path.name}.old-{k}") for k in itertools.count(1))
            path.rename(next(other for other in free if not other.exists()))

    def load_config(self) -> Record:
        """The merged configuration as nested dictionaries; empty if the file is missing or no mapping."""
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except yaml.YAMLError as error:
            logger.warning("%s is not readable YAML: %s", self.config, error)
            return {}
        return config if isinstance(config, dict) else {}

    def load_metrics(self) -> list[Record]:
        """One object per completed epoch, in the order of recording; a torn last line is left out."""
        return read_jsonl(self.metrics)

    def load_events(self) -> list[Record]:
        """All events in the order of recording; a torn last line is left out."""
        return read_jsonl(self.events)


def read_jsonl(path: Path) -> list[Record]:
    """The objects of a JSON-lines file; empty if there is none.

    A line torn by a crash can only be the last one and is left out silently; any other unreadable line is
    left out with a warning, for one bad block must not cost the rest of a run's history.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # also UnicodeDecodeError
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines) and line.strip():
            logger.warning("%s, line %d is not a JSON object and was left out", path, number)
    return records


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part, whenever the process or the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        # Exclusive, so that no link laid in its way is followed.
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def to_json_value(value: Any) -> Any:
    """`value` in JSON's types: NaN and infinities become None, tensors and arrays numbers or lists."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return to_json_value(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot record a value of type {type(value).__name__}: {value!r}")


class JsonLines:
    """An append-only JSON-lines file whose every line is on disk when `append` returns.

    A full disk loses nothing: lines that did not fit wait in memory for the next `append`, and no part of one is left
    in the file meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""
        self._end_torn_line()
        self._file = self._open()

    def _open(self) -> FileIO:
        return FileIO(self._path, "a")

    def _end_torn_line(self) -> None:
        """A crash may have left half a line: what is appended next must not become its other half."""
        content = self._path.read_bytes() if self._path.exists() else b""
        if content and not content.endswith(b"\n"):
            self.rewrite(read_jsonl(self._path))

    def append(self, record: Record) -> None:
        """Raises OSError where the disk does not take it, having kept it for later."""
        self._waiting += (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        self._flush()

    def _flush(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise
        self._waiting = b""

    def rewrite(self, records: Iterable[Record]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(self._path, text)

    def keep(self, records: Iterable[Record]) -> None:
        """Replaces the content; what is appended later goes to the new file."""
        self._file.close()
        self._waiting = b""
        self.rewrite(records)
        self._file = self._open()

    def close(self) -> None:
        try:
            if not self._file.closed:
                self._flush()
        finally:
            self._file.close()
