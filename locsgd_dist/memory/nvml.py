"""What NVML knows about a GPU's memory; the only file that knows NVML.

NVML sees what an allocator cannot: the CUDA context, workspaces of libraries, other processes. It is also often
incomplete (no driver, an old one, containers with their own PIDs, Windows), and never worth a crash: what it does not
give is ``None``, and the reason is logged once.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one GPU over all processes. ``used`` includes the part that driver and firmware reserve."""

    used: int
    total: int
    reserved: int | None  # a subset of `used`; None where the driver is too old to tell it apart


class NvmlDevice:
    """One GPU or MIG device. Made by :func:`open_device`; holds NVML initialised until :meth:`close`."""

    def __init__(self, handle: Any, uuid: str) -> None:
        self.uuid = uuid
        self._handle = handle
        self._reported: set[str] = set()

    def memory(self) -> DeviceMemory | None:
        """Memory of the whole device now, or None where NVML does not say."""
        info = self._ask("memory in use", lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle))
        if info is None:
            return None
        version = pynvml.nvmlMemory_v2
        v2 = self._ask("reserved memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=version))
        return DeviceMemory(used=info.used, total=info.total, reserved=v2.reserved if v2 else None)

    def process_used(self, pid: int | None = None) -> int | None:
        """Bytes that one process (default: this one) holds on the device, or None where NVML does not say.

        A container without the host's PID namespace sees host PIDs and finds itself missing.
        """
        processes = self._ask("memory by process", self._compute_processes)
        if processes is None:
            return None
        pid = os.getpid() if pid is None else pid
        used = [process.usedGpuMemory for process in processes if process.pid == pid]
        if processes and not used:
            self._report("memory by process", "this process is not in the driver's list, as in most containers")
        if None in used:
            self._report("memory by process", "the driver does not account memory by process")
        return sum(used) if used and None not in used else None

    def close(self) -> None:
        """Give NVML back; the device must not be used afterwards."""
        _shutdown()

    def _compute_processes(self) -> list[Any]:
        try:
            return pynvml.nvmlDeviceGetComputeRunningProcesses_v3(self._handle)
        except pynvml.NVMLError_FunctionNotFound:  # drivers before 510
            return pynvml.nvmlDeviceGetComputeRunningProcesses_v2(self._handle)

    def _ask(self, what: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except pynvml.NVMLError as error:
            self._report(what, str(error))
            return None

    def _report(self, what: str, reason: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            logger.warning("NVML does not give %s of %s: %s", what, self.uuid, reason)


def open_device(selector: str | int) -> NvmlDevice | None:
    """The device with a UUID (``GPU-…``, ``MIG-…``, or as many leading characters as single it out) or NVML index.

    NVML numbers GPUs by PCI bus, CUDA usually the fastest first: prefer the UUID. Returns None, and logs why, where
    there is no NVML or no such device.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.warning("NVML is not available (%s): GPU memory comes from the allocator alone", error)
        return None
    try:
        handle = _handle(selector)
        return NvmlDevice(handle, str(pynvml.nvmlDeviceGetUUID(handle)))
    except pynvml.NVMLError as error:
        logger.warning("NVML does not know GPU %s (%s): memory comes from the allocator alone", selector, error)
        _shutdown()
        return None


def used_by_uuid() -> dict[str, int]:
    """Bytes in use on every GPU now, by UUID: a baseline to subtract later. Empty where there is no NVML."""
    used: dict[str, int] = {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return used  # open_device says why
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            used[str(pynvml.nvmlDeviceGetUUID(handle))] = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    except pynvml.NVMLError as error:
        logger.debug("NVML gave no complete baseline: %s", error)
    finally:
        _shutdown()
    return used


def device_selector(ordinal: int, cuda_uuid: str | None, environ: Mapping[str, str] = os.environ) -> str | int:
    """What to give :func:`open_device` for CUDA's device ``ordinal``.

    A UUID in ``CUDA_VISIBLE_DEVICES`` comes first, since CUDA does not tell a MIG device's everywhere; then the UUID
    that CUDA gives; last the number in ``CUDA_VISIBLE_DEVICES``, which is NVML's only if both count alike.

    Args:
        cuda_uuid: CUDA's UUID of the device without the prefix ``GPU-``; None while CUDA is not initialised.
    """
    entries = [entry.strip() for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    entry = entries[ordinal] if ordinal < len(entries) else ""
    if entry.startswith(("GPU-", "MIG-")):
        return entry
    if cuda_uuid is not None:
        return f"GPU-{cuda_uuid}"
    return int(entry) if entry.isdecimal() else ordinal


def _handle(selector: str | int) -> Any:
    if isinstance(selector, int):
        return pynvml.nvmlDeviceGetHandleByIndex(selector)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(selector)
    except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        matches = [h for h in handles if str(pynvml.nvmlDeviceGetUUID(h)).startswith(selector)]
        if len(matches) != 1:
            raise
        return matches[0]


def _shutdown() -> None:
    with contextlib.suppress(pynvml.NVMLError):  # a driver that is gone needs no farewell
        pynvml.nvmlShutdown()
