"""NVML through the real ``pynvml`` against a small compiled library whose GPUs a text file describes.

Each case is a process of its own: the library is loaded once per process and stays.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locsgd_dist.memory import nvml

STUB_SOURCE = Path(__file__).parent / "nvml_stub" / "nvml_stub.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the NVML stub")

# From its file: the package would import torch, seconds for each of these processes.
LOAD_NVML = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("nvml", {nvml.__file__!r})
nvml = importlib.util.module_from_spec(spec)
sys.modules["nvml"] = nvml  # dataclasses look their module up
spec.loader.exec_module(nvml)
"""
PRELUDE = """
import ctypes, json, logging, os
from pathlib import Path
logging.basicConfig(format="%(levelname)s %(message)s")
gpus = Path(os.environ["NVML_STUB_FILE"])
out = {}
"""
ONE_GPU = "gpu GPU-aaaa-1111 10000 3000 400\n"
TWO_GPUS = ONE_GPU + "gpu GPU-bbbb-2222 20000 5000 600\n"

Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="session")
def build_stub(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    built: dict[tuple[str, ...], Path] = {}

    def build(*missing: str) -> Path:
        if missing not in built:
            folder = tmp_path_factory.mktemp("nvml")
            soname = "libnvidia-ml.so.1"
            flags = ["-shared", "-fPIC", "-Wall", "-Werror", f"-Wl,-soname,{soname}"]
            defines = [f"-D{name}" for name in missing]
            command = [str(COMPILER), *flags, *defines, "-o", str(folder / soname), str(STUB_SOURCE)]
            subprocess.run(command, check=True)
            built[missing] = folder
        return built[missing]

    return build


@pytest.fixture
def run(build_stub: Callable[..., Path], tmp_path: Path) -> Run:
    """Run a script beside the stub; return what it left in ``out`` and the log lines."""

    def run(script: str, file: str, *, missing: tuple[str, ...] = (), **env: str) -> tuple[dict[str, Any], str]:
        (tmp_path / "gpus.txt").write_text(file)
        environ = {**os.environ, "LD_LIBRARY_PATH": str(build_stub(*missing)), **env}
        environ["NVML_STUB_FILE"] = str(tmp_path / "gpus.txt")
        program = LOAD_NVML + PRELUDE + textwrap.dedent(script) + "\nprint(json.dumps(out))"
        done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


@needs_compiler
def test_memory_falls_as_the_device_frees_it(run: Run) -> None:
    out, log = run(
        """
        device = nvml.open_device(0)
        out["used"] = []
        for used in (3000, 7000, 2000):
            gpus.write_text(f"gpu GPU-aaaa-1111 10000 {used} 400\\nprocess GPU-aaaa-1111 self {used - 500}\\n")
            memory = device.memory()
            out["used"].append([memory.used, memory.reserved, memory.total, device.process_used()])
        device.close()
        out["users"] = ctypes.CDLL("libnvidia-ml.so.1").stubUsers()
        """,
        ONE_GPU,
    )
    # NVML's first interface counts the reserved part as used, the second one apart.
    assert out["used"] == [[3400, 400, 10000, 2500], [7400, 400, 10000, 6500], [2400, 400, 10000, 1500]]
    assert out["users"] == 0
    assert log == ""


@needs_compiler
def test_a_uuid_finds_its_device_whatever_the_order(run: Run) -> None:
    script = """
        lines = gpus.read_text().splitlines()
        for name, order in (("straight", lines), ("swapped", lines[::-1])):
            gpus.write_text("\\n".join(order))
            devices = [nvml.open_device(uuid) for uuid in ("GPU-aaaa-1111", "GPU-bbbb-2222", "GPU-bb")]
            out[name] = [[d.uuid, d.memory().total] for d in devices]
            out[name + " by index"] = nvml.open_device(0).uuid
            out[name + " baseline"] = nvml.used_by_uuid()
        """
    out, log = run(script, TWO_GPUS)
    expected = [["GPU-aaaa-1111", 10000], ["GPU-bbbb-2222", 20000], ["GPU-bbbb-2222", 20000]]
    assert out["straight"] == out["swapped"] == expected
    assert (out["straight by index"], out["swapped by index"]) == ("GPU-aaaa-1111", "GPU-bbbb-2222")
    assert out["straight baseline"] == out["swapped baseline"] == {"GPU-aaaa-1111": 3400, "GPU-bbbb-2222": 5600}
    assert log == ""


@needs_compiler
def test_a_mig_device_is_found_by_its_uuid(run: Run) -> None:
    out, _ = run(
        """
        selector = nvml.device_selector(0, cuda_uuid="aaaa-1111")
        device = nvml.open_device(selector)
        out |= {"selector": selector, "total": device.memory().total, "mine": device.process_used()}
        """,
        ONE_GPU + "mig MIG-cccc-3333 5000 100 0\nprocess MIG-cccc-3333 self 64\n",
        CUDA_VISIBLE_DEVICES="MIG-cccc-3333",
    )
    assert out == {"selector": "MIG-cccc-3333", "total": 5000, "mine": 64}


@needs_compiler
@pytest.mark.parametrize(
    ("processes", "used", "said"),
    [
        ("process GPU-aaaa-1111 self 700\nprocess GPU-aaaa-1111 1 900\n", 700, ""),
        ("process GPU-aaaa-1111 self 700\nprocess GPU-aaaa-1111 self 50\n", 750, ""),  # two contexts
        ("process GPU-aaaa-1111 1 900\n", None, "not in the driver's list"),  # host PIDs in a container
        ("process GPU-aaaa-1111 self unknown\n", None, "does not account memory by process"),  # WDDM
        ("", None, ""),  # before this process has used the GPU
    ],
)
def test_own_use_is_given_only_where_the_driver_tells_it(run: Run, processes: str, used: int | None, said: str) -> None:
    out, log = run(
        """
        device = nvml.open_device(0)
        out["used"] = [device.process_used() for _ in range(3)]
        """,
        ONE_GPU + processes,
    )
    assert out["used"] == [used] * 3
    assert log.count("WARNING") == (1 if said else 0)
    assert said in log


@needs_compiler
@pytest.mark.parametrize(
    ("missing", "expected", "warnings"),
    [
        ((), [3400, 400, 700], 0),
        (("WITHOUT_V3_PROCESSES",), [3400, 400, 700], 0),  # the older interface says the same
        (("WITHOUT_V2_MEMORY",), [3400, None, 700], 1),
        (("WITHOUT_PROCESSES", "WITHOUT_V2_MEMORY"), [3400, None, None], 2),
    ],
)
def test_missing_symbols_of_older_drivers_are_missing_values(
    run: Run, missing: tuple[str, ...], expected: list[int | None], warnings: int
) -> None:
    out, log = run(
        """
        device = nvml.open_device("GPU-aaaa-1111")
        for _ in range(3):
            memory = device.memory()
            out["got"] = [memory.used, memory.reserved, device.process_used()]
        """,
        ONE_GPU + "process GPU-aaaa-1111 self 700\n",
        missing=missing,
    )
    assert out["got"] == expected
    assert log.count("WARNING") == warnings  # each once, not at every sample


@needs_compiler
def test_a_driver_error_in_mid_run_is_a_gap_not_a_crash(run: Run) -> None:
    out, log = run(
        """
        device = nvml.open_device(0)
        healthy = gpus.read_text()
        out["used"] = []
        for trouble in ("", "error nvmlDeviceGetMemoryInfo 15\\n", "error nvmlDeviceGetMemoryInfo 999\\n", ""):
            gpus.write_text(healthy + trouble)
            memory = device.memory()
            out["used"].append(memory and memory.used)
        """,
        ONE_GPU,
    )
    assert out["used"] == [3400, None, None, 3400]
    assert log.count("WARNING") == 1
    assert "NVML does not give memory in use of GPU-aaaa-1111: GPU is lost" in log


@needs_compiler
@pytest.mark.parametrize(
    ("file", "selector", "said"),
    [
        (ONE_GPU + "error nvmlInitWithFlags 9\n", 0, "NVML is not available (Driver Not Loaded)"),
        (ONE_GPU, 3, "NVML does not know GPU 3"),
        (ONE_GPU, "GPU-ffff", "NVML does not know GPU GPU-ffff"),
        (TWO_GPUS, "GPU-", "NVML does not know GPU GPU-"),  # fits both
        (ONE_GPU + "error nvmlDeviceGetUUID 3\n", 0, "NVML does not know GPU 0 (Not Supported)"),
    ],
)
def test_a_device_that_cannot_be_opened_is_none_with_the_reason(
    run: Run, file: str, selector: str | int, said: str
) -> None:
    out, log = run(
        f"""
        out["device"] = nvml.open_device({selector!r})
        out["baseline"] = nvml.used_by_uuid()
        out["users"] = ctypes.CDLL("libnvidia-ml.so.1").stubUsers()
        """,
        file,
    )
    assert out["device"] is None
    assert out["users"] == 0
    assert said in log
    assert log.count("WARNING") == 1


def test_no_library_at_all(tmp_path: Path) -> None:
    """Where a machine has NVML, a file that is no library hides it."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    script = (
        LOAD_NVML
        + """
print(nvml.open_device(0), nvml.used_by_uuid())
"""
    )
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "None {}\n", done.stderr
    assert "NVML is not available (NVML Shared Library Not Found)" in done.stderr


@needs_compiler
def test_the_monitor_follows_nvml_through_a_run(run: Run, tmp_path: Path) -> None:
    """Own use first; without it the device's use above the baseline, by UUID; a reset forgets the peak."""
    out, _ = run(
        f"""
        import time
        import torch
        from locsgd_dist.memory.monitor import FootprintMonitor, MonitorConfig

        def world(a, b, processes=""):
            draft = gpus.with_suffix(".draft")  # the trace's thread must never read half a file
            draft.write_text(f"gpu GPU-aaaa-1111 10000 {{a}} 400\\ngpu GPU-bbbb-2222 20000 {{b}} 600\\n" + processes)
            draft.replace(gpus)

        def footprint():
            found = monitor.footprint()
            return [found.bytes, found.source]

        world(3000, 5000)
        config = MonitorConfig(trace_hz=200)
        csv = Path({str(tmp_path)!r}) / "memory.csv"
        with FootprintMonitor(config, torch.device("cuda:0")) as monitor:
            monitor.start_trace(csv, rank=3)
            world(9000, 6500)
            out["above baseline"] = footprint()
            world(9000, 5800)
            out["peak stays"] = footprint()
            monitor.reset_peak()
            out["falls after reset"] = footprint()
            world(9000, 9900, "process GPU-bbbb-2222 self 1234\\nprocess GPU-bbbb-2222 1 99\\n")
            out["own process"] = footprint()
            while ",1234," not in csv.read_text():  # the trace is written once a second
                time.sleep(0.05)
            gpus.unlink()
            out["driver gone"] = footprint()
        """,
        TWO_GPUS,
        CUDA_VISIBLE_DEVICES="GPU-bbbb-2222",
    )
    assert out["above baseline"] == [1500, "nvml"]
    assert out["peak stays"] == [1500, "nvml"]
    assert out["falls after reset"] == [800, "nvml"]
    assert out["own process"] == [1234, "nvml"]
    assert out["driver gone"] == [1234, "nvml"]  # the last peak is still known
    lines = (tmp_path / "memory.csv").read_text().splitlines()
    assert lines[0].startswith("time,rank,nvml_device_used,nvml_device_reserved,nvml_process_used,")
    assert any(line.split(",")[1:5] == ["3", "10500", "600", "1234"] for line in lines[1:])


@pytest.mark.parametrize(
    ("visible", "cuda_uuid", "expected"),
    [
        (None, "1234-ab", "GPU-1234-ab"),
        ("1,0", "1234-ab", "GPU-1234-ab"),  # CUDA knows better than a number
        ("GPU-99,GPU-77", "1234-ab", "GPU-77"),
        ("MIG-5, MIG-6", None, "MIG-6"),
        ("3,2", None, 2),
        (None, None, 1),
        ("", None, 1),
    ],
)
def test_device_selector(visible: str | None, cuda_uuid: str | None, expected: str | int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert nvml.device_selector(1, cuda_uuid, environ) == expected
