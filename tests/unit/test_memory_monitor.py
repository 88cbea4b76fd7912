"""The monitor on the CPU: footprints against closed forms, the trace as a file, and failures that must not matter."""

from __future__ import annotations

import csv
import logging
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from locsgd_dist.memory import Footprint, FootprintMonitor, MonitorConfig
from locsgd_dist.memory.cuda import CudaMemory
from locsgd_dist.memory.host import peak_resident_bytes, resident_bytes
from locsgd_dist.memory.trace import COLUMNS, MemoryTrace

CPU = torch.device("cpu")
QUIET = MonitorConfig(trace_hz=0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def traced(config: MonitorConfig, device: torch.device, path: Path, rank: int) -> FootprintMonitor:
    monitor = FootprintMonitor(config, device)
    monitor.start_trace(path, rank)
    return monitor


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


class LargeLinear:
    """One layer whose weight, gradient and momentum of 4 * 300 * 200 bytes each dwarf everything else."""

    weight_bytes = 4 * 300 * 200

    def __init__(self) -> None:
        self.model = nn.Linear(300, 200, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.images = torch.ones(1, 300)

    def step(self) -> None:
        self.model(self.images).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self) -> int:
        """Of any step that begins with momentum: at the end of backward, with loss and its gradient."""
        return 3 * self.weight_bytes + self.images.nbytes + 8


def test_a_measured_step_gives_exact_bytes() -> None:
    training = LargeLinear()
    training.step()
    with FootprintMonitor(QUIET, CPU) as monitor:
        with monitor.measured_step(training.model, training.optimizer):
            training.step()
        assert monitor.footprint() == Footprint(training.peak_bytes(), "tensor_bytes")


def test_what_lives_but_is_not_touched_counts() -> None:
    """A frozen layer that a step does not run, the state of its optimizer, and a gradient from the last step."""
    training = LargeLinear()
    idle = nn.Linear(50, 60)
    optimizer = torch.optim.SGD([*training.model.parameters(), *idle.parameters()], lr=0.1, momentum=0.9)
    (training.model(training.images).sum() + idle(torch.ones(1, 50)).sum()).backward()
    optimizer.step()
    training.model.zero_grad(set_to_none=True)
    both = nn.ModuleList([training.model, idle])
    with FootprintMonitor(QUIET, CPU) as monitor:
        with monitor.measured_step(both, optimizer):
            training.model(training.images).sum().backward()
        idle_bytes = 3 * 4 * (50 * 60 + 60)
        assert monitor.footprint().bytes == training.peak_bytes() + idle_bytes


def test_reset_forgets_the_last_measurement_and_the_largest_since_counts() -> None:
    training = LargeLinear()
    training.step()
    with FootprintMonitor(QUIET, CPU) as monitor:
        with monitor.measured_step(training.model, training.optimizer):
            extra = torch.ones(100_000)
            training.step()
        del extra
        with monitor.measured_step(training.model, training.optimizer):
            training.step()
        assert monitor.footprint().bytes == training.peak_bytes() + 400_000
        monitor.reset_peak()
        assert monitor.footprint().source == "host_rss"
        with monitor.measured_step(training.model, training.optimizer):
            training.step()
        assert monitor.footprint().bytes == training.peak_bytes()


def test_a_failing_step_raises_and_leaves_no_measurement() -> None:
    training = LargeLinear()
    with FootprintMonitor(QUIET, CPU) as monitor:
        with pytest.raises(MemoryError), monitor.measured_step(training.model, training.optimizer):
            raise MemoryError
        assert monitor.footprint().source == "host_rss"


def test_resident_memory_follows_an_allocation() -> None:
    size = 1 << 28
    before = resident_bytes()
    assert before is not None
    block = bytearray(os.urandom(1 << 20) * (size >> 20))
    after = resident_bytes()
    assert after is not None
    assert 0.9 * size < after - before < 1.1 * size
    peak = peak_resident_bytes()
    assert peak is not None
    assert peak >= after
    assert peak == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.05)
    with FootprintMonitor(QUIET, CPU) as monitor:
        high = monitor.footprint()
        del block
        monitor.reset_peak()
        low = monitor.footprint()
    assert high.source == low.source == "host_rss"
    assert high.bytes - low.bytes > 0.9 * size


def test_the_trace_has_a_header_and_a_line_per_sample(tmp_path: Path) -> None:
    path = tmp_path / "run" / "memory.csv"
    training = LargeLinear()
    start = time.time()
    with traced(MonitorConfig(trace_hz=100), CPU, path, rank=5) as monitor:
        with monitor.measured_step(training.model, training.optimizer):
            training.step()
        expected = monitor.footprint().bytes
        wait_until(lambda: any(row["tensor_peak"] == str(expected) for row in read(path)))
    rows = read(path)
    assert tuple(rows[0]) == COLUMNS
    times = [float(row["time"]) for row in rows]
    assert times == sorted(times)
    assert start - 1 < times[0] <= times[-1] < time.time() + 1
    for row in rows:
        assert row["rank"] == "5"
        assert 1 << 20 < int(row["host_rss"]) <= int(row["host_peak_rss"])
        assert row["nvml_device_used"] == row["cuda_allocated"] == ""  # missing, not zero


def test_nothing_is_lost_at_the_end_and_the_thread_ends(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    monitor = traced(MonitorConfig(trace_hz=0.01), CPU, path, rank=0)
    assert "memory-trace" in {thread.name for thread in threading.enumerate()}
    monitor.close()
    monitor.close()
    assert "memory-trace" not in {thread.name for thread in threading.enumerate()}
    assert len(read(path)) == 1  # the first sample; the next was 100 seconds away


def test_no_trace_at_zero_hertz(tmp_path: Path) -> None:
    traced(QUIET, CPU, tmp_path / "memory.csv", rank=0).close()
    assert list(tmp_path.iterdir()) == []


def write_samples(path: Path, rank: int, count: int) -> None:
    trace = MemoryTrace(path, rank)
    for sample in range(count):
        trace.append(1000.0 + sample, {"host_rss": 10 * rank + sample})  # a second each: every line is a write
    trace.close()


def test_ranks_share_the_file_without_tearing_lines(tmp_path: Path) -> None:
    path, count = tmp_path / "memory.csv", 400
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=write_samples, args=(path, rank, count)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    rows = read(path)
    assert len(rows) == 3 * count
    for rank in range(3):
        mine = [int(row["host_rss"]) for row in rows if row["rank"] == str(rank)]
        assert mine == [10 * rank + sample for sample in range(count)]


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    for start in (0, 5):
        trace = MemoryTrace(path, rank=0)
        trace.append(1000.0 + start, {"cuda_allocated": start})
        trace.close()
    assert path.read_text() == (
        ",".join(COLUMNS) + "\n1000.000,0,,,,0,,,,,,\n1005.000,0,,,,5,,,,,,\n"  # zero is a value, empty is missing
    )


def test_a_trace_that_cannot_be_opened_is_said_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with traced(MonitorConfig(), CPU, tmp_path / "file" / "memory.csv", rank=0) as monitor:
        assert monitor.footprint().bytes > 0
    assert "no memory trace" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to play a full disk")
def test_a_full_disk_ends_the_trace_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        traced(MonitorConfig(trace_hz=100), CPU, Path("/dev/full"), rank=0) as monitor,
    ):
        wait_until(lambda: "the memory trace ends here" in caplog.text)
        assert monitor.footprint().bytes > 0
    assert caplog.text.count("the memory trace ends here") == 1


@pytest.mark.parametrize("trace_hz", [-1.0, 1e9, float("nan")])
def test_config_refuses_impossible_rates(trace_hz: float) -> None:
    with pytest.raises(ValueError, match=r"monitor\.trace_hz must lie in \[0, 1000\]"):
        MonitorConfig(trace_hz=trace_hz)


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        ({"nvml_process_used": 900, "cuda_peak_reserved": 700}, Footprint(900, "nvml")),
        # Another process with our number outside the container cannot hold less than we have reserved.
        ({"nvml_process_used": 600, "cuda_peak_reserved": 700}, Footprint(700, "cuda_allocator")),
        ({"cuda_peak_reserved": 700, "nvml_device_used": 5000}, Footprint(700, "cuda_allocator")),  # no baseline
        ({"cuda_peak_reserved": 0}, Footprint(0, "cuda_allocator")),
        ({"nvml_process_used": None, "cuda_peak_reserved": None}, None),
    ],
)
def test_order_of_trust_on_cuda(peaks: dict[str, int | None], expected: Footprint | None) -> None:
    assert CudaMemory(torch.device("cuda:0"), use_nvml=False).footprint(peaks) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_monitor_of_a_gpu_that_is_not_there_falls_back_to_the_host(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    with traced(MonitorConfig(nvml=False), torch.device("cuda:0"), path, rank=0) as monitor:
        monitor.reset_peak()
        assert monitor.footprint().source == "host_rss"
    assert read(path)[0]["cuda_reserved"] == ""
