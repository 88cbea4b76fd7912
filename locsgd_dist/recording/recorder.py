"""One interface for all that a run records."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from locsgd_dist.recording.config import RunConfig
from locsgd_dist.recording.console import open_console
from locsgd_dist.recording.directory import RunDirectory, to_json_value, write_atomically
from locsgd_dist.recording.sinks import JsonlSink, ReportSink, Sink, TensorBoardSink

logger = logging.getLogger(__name__)


class Recorder:
    """Hands each epoch's metrics, each event and the live progress to every sink; closes them in one place.

    Use as a context manager:

        with Recorder.open(run_dir, config.run, rank=rank, config_yaml=text) as recorder:
            recorder.epoch(metrics)
    """

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    @classmethod
    def open(cls, run_dir: Path, config: RunConfig, *, rank: int, config_yaml: str) -> Recorder:
        """Makes the directory, writes config.yaml, opens the sinks of `config`; nothing on other ranks."""
        if rank != 0:
            return cls()
        directory = RunDirectory(run_dir)
        directory.path.mkdir(parents=True, exist_ok=True)
        write_atomically(directory.config, config_yaml)
        sinks: list[Sink] = [JsonlSink(directory)]
        if config.tensorboard:
            sinks.append(TensorBoardSink(directory.tensorboard))
        sinks.append(open_console(config.console, num_epochs=_num_epochs(directory)))
        if config.report_every is not None:
            sinks.append(ReportSink(directory, config.report_every))
        return cls(sinks)

    @property
    def step_due(self) -> bool:
        """Whether a `step` now would be shown: ask before paying for a loss on the host."""
        return any(sink.step_due for sink in self._sinks)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Records a completed epoch: `epoch` (from 0) at least; values may be tensors, NaN is stored as null."""
        if not self._sinks:
            return
        record = to_json_value(metrics)
        for sink in self._sinks:
            with _surviving(sink):
                sink.epoch(record)

    def event(self, type: str, *, epoch: int, samples_seen: int, **fields: Any) -> None:
        """Records an event with the present time (`time`: unix seconds) and its own fields."""
        if not self._sinks:
            return
        header = {"type": type, "epoch": epoch, "samples_seen": samples_seen, "time": time.time()}
        record = to_json_value(header | fields)
        for sink in self._sinks:
            with _surviving(sink):
                sink.event(record)

    def step(self, *, epoch: int, fraction: float, loss: float | None, images_per_second: float) -> None:
        """Shows live progress: `fraction` of `epoch` is done. Throttled: most calls return at once."""
        for sink in self._sinks:
            if sink.step_due:
                with _surviving(sink):
                    sink.step(epoch=epoch, fraction=fraction, loss=loss, images_per_second=images_per_second)

    def truncate_to(self, epoch: int, samples_seen: int | None = None) -> None:
        """Before a resumed run goes on after `epoch`: drops what it is going to record again.

        Metrics of later epochs go, and events after `samples_seen` (default: the end of `epoch`; give the
        checkpoint's own count when it was taken inside an epoch). Incidents (`oom`, `preempt`, `resume`)
        stay: they happened, and will not be repeated.
        """
        for sink in self._sinks:
            sink.truncate_to(epoch, samples_seen)

    def close(self) -> None:
        """Closes every sink, also when closing one of them fails."""
        sinks, self._sinks = self._sinks, ()
        with ExitStack() as stack:
            for sink in reversed(sinks):  # a stack unwinds backwards: files first, the report of them last
                stack.callback(_close, sink)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _surviving(sink: Sink) -> Iterator[None]:
    """A full disk under a log, or under standard output, must not end the training that they tell of."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not write: %s", type(sink).__name__, error)


def _close(sink: Sink) -> None:
    with _surviving(sink):
        sink.close()


def _num_epochs(directory: RunDirectory) -> int | None:
    """`train.epochs` of the configuration, so that the console can say how many are to come."""
    section = directory.load_config().get("train")
    epochs = section.get("epochs") if isinstance(section, dict) else None
    return epochs if isinstance(epochs, int) else None
