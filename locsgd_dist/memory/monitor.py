"""The footprint of this rank: the most bytes it holds on its device in a step, and a trace of them over time."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cuda import CudaMemory, Readings
from .footprint import Footprint
from .host import peak_resident_bytes, resident_bytes
from .tensor_bytes import TensorByteTracker, optimizer_state_tensors
from .trace import MemoryTrace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitorConfig:
    """How memory is watched while training."""

    trace_hz: float = 10.0
    """Samples per second that every rank writes to memory.csv in the run directory; 0 writes none."""

    nvml: bool = True
    """Ask NVIDIA's management library, which sees what torch's allocator does not (context, workspaces)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.trace_hz) and 0 <= self.trace_hz <= 1000):
            raise ValueError(f"monitor.trace_hz must lie in [0, 1000], got {self.trace_hz}")


class FootprintMonitor:
    """Watches the memory of one rank; a context manager that stops its thread at the end.

    Where the number comes from, the most trusted first. On CUDA: NVML's account of this process; the device's use
    above a baseline (construct the monitor before CUDA's first use, else the context is left out); the allocator's
    peak of reserved memory. On the CPU: exact tensor bytes of the last :meth:`measured_step`; before one, resident
    memory. Whatever cannot be read is missing from the trace, reported once, and never stops the training.

    Args:
        config: the ``monitor`` section.
        device: the device of this rank.
    """

    def __init__(self, config: MonitorConfig, device: torch.device) -> None:
        self._config = config
        self._cuda = CudaMemory(device, use_nvml=config.nvml) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._peaks: dict[str, int] = {}
        self._tensor_peak: int | None = None
        self._earlier: Footprint | None = None
        self._trace: MemoryTrace | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start_trace(self, csv_path: Path, rank: int) -> None:
        """Write a trace from now on, in a thread of its own; none with ``monitor.trace_hz=0``.

        Args:
            csv_path: the file, shared by the ranks.
            rank: written into every line.
        """
        if self._config.trace_hz == 0 or self._thread is not None:
            return
        try:
            self._trace = MemoryTrace(csv_path, rank)
        except OSError as error:
            logger.warning("no memory trace: %s", error)
            return
        self._thread = threading.Thread(
            target=self._run, args=(1 / self._config.trace_hz,), name="memory-trace", daemon=True
        )
        self._thread.start()

    def flush_trace(self) -> None:
        """Writes what the trace has gathered, as it does each second by itself: for a reader that is about to look."""
        if self._trace is not None:
            with contextlib.suppress(OSError):
                self._trace.flush()

    def reset_peak(self) -> None:
        """Start a new measurement: drop garbage and cached blocks, forget the peaks.

        Call it at each shift, after references to the old wrapper and state are gone, and before each measurement.
        """
        gc.collect()
        with self._lock:
            if self._cuda is not None:
                self._cuda.reset_peak()
            self._peaks.clear()
            self._tensor_peak = None
            self._earlier = None

    @contextlib.contextmanager
    def measured_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around one whole training step, forward to optimizer step: on the CPU, count its exact tensor bytes.

        Counted are parameters, buffers, gradients, optimizer state and all that the step reads or makes; DDP's
        buckets too. The step's results are the same; a ``torch.compile``d model runs this step eagerly. On CUDA
        the allocator keeps peaks anyway and this does nothing. A step that fails leaves no measurement.
        """
        if self._cuda is not None:
            yield
            return
        tracker = TensorByteTracker()
        tracker.baseline([*model.parameters(), *model.buffers(), *optimizer_state_tensors(optimizer)])
        tracker.baseline(p.grad for p in model.parameters() if p.grad is not None)
        with tracker:
            yield
        with self._lock:
            self._tensor_peak = max(tracker.peak_bytes, self._tensor_peak or 0)

    def footprint(self) -> Footprint:
        """Peak bytes of this rank since :meth:`reset_peak`; 0 from ``host_rss`` where nothing can be read."""
        now, earlier = self._footprint_of_this_process(), self._earlier
        if earlier is None or (now.source == earlier.source and now.bytes >= earlier.bytes):
            return now
        return earlier if now.source in ("host_rss", earlier.source) else now

    def state_dict(self) -> dict[str, Any]:
        footprint = self.footprint()
        return {"bytes": footprint.bytes, "source": footprint.source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the footprint that an earlier process has measured since its :meth:`reset_peak` into account."""
        # Resident memory stands in where nothing better is known yet, and says nothing of another process.
        self._earlier = None if state["source"] == "host_rss" else Footprint(state["bytes"], state["source"])

    def _footprint_of_this_process(self) -> Footprint:
        self._sample()
        with self._lock:
            if self._cuda is not None and (found := self._cuda.footprint(self._peaks)) is not None:
                return found
            if self._tensor_peak is not None:
                return Footprint(self._tensor_peak, "tensor_bytes")
            return Footprint(self._peaks.get("host_rss", self._peaks.get("host_peak_rss", 0)), "host_rss")

    def close(self) -> None:
        """Stop the thread and finish the trace; safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            if self._cuda is not None:
                self._cuda.close()
        if self._trace is not None:
            with contextlib.suppress(OSError):
                self._trace.close()
            self._trace = None

    def __enter__(self) -> FootprintMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, period: float) -> None:
        assert self._trace is not None
        try:
            while True:
                self._trace.append(time.time(), self._sample())
                if self._stop.wait(period):
                    return
        except Exception as error:  # a full disk, a lost GPU: the training matters more than its trace
            logger.warning("the memory trace ends here: %s", error)

    def _sample(self) -> Readings:
        """Read every source and raise the peaks."""
        readings: Readings = {"host_rss": resident_bytes(), "host_peak_rss": peak_resident_bytes()}
        with self._lock:
            if self._cuda is not None:
                readings |= self._cuda.read()
            for name, value in readings.items():
                if value is not None:
                    self._peaks[name] = max(value, self._peaks.get(name, 0))
            readings["tensor_peak"] = self._tensor_peak
        return readings
