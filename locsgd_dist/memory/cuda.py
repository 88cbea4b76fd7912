"""The memory of one CUDA device as this process's allocator and NVML see it, and the footprint that follows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import nvml
from .footprint import Footprint

Readings = dict[str, int | None]  # bytes by source; None where the source does not say


class CudaMemory:
    """Reads a CUDA device without ever initialising CUDA.

    Made before CUDA is initialised, it takes the baseline that tells this process's memory from that of others;
    made later, it subtracts what this process has reserved so far, and the CUDA context counts as not ours.
    """

    def __init__(self, device: torch.device, *, use_nvml: bool) -> None:
        self._device = device
        self._use_nvml = use_nvml
        self._baselines = {} if torch.cuda.is_initialized() or not use_nvml else nvml.used_by_uuid()
        self._baseline: int | None = None
        self._nvml: nvml.NvmlDevice | None = None
        self._nvml_device()

    def read(self) -> Readings:
        """Bytes now and at the allocator's peaks, by the names of the trace's columns."""
        readings = self._read_allocator()
        device = self._nvml_device()
        memory = device.memory() if device else None
        readings["nvml_device_used"] = memory.used if memory else None
        readings["nvml_device_reserved"] = memory.reserved if memory else None
        readings["nvml_process_used"] = device.process_used() if device else None
        return readings

    def footprint(self, peaks: Mapping[str, int | None]) -> Footprint | None:
        """Bytes of this process and their source, from the highest readings since the last reset.

        In the order of trust: NVML's account of this process; what NVML sees in use above the baseline; the
        allocator. The first two are believed only if they hold at least what the allocator has reserved: a smaller
        number belongs to another process that has our PID outside of our container, or to a baseline gone stale.
        """
        reserved = peaks.get("cuda_peak_reserved")
        process_used, device_used = peaks.get("nvml_process_used"), peaks.get("nvml_device_used")
        if process_used is not None and process_used >= (reserved or 0):
            return Footprint(process_used, "nvml")
        if device_used is not None and self._baseline is not None:
            used = device_used - self._baseline
            if used > 0 and used >= (reserved or 0):
                return Footprint(used, "nvml")
        return None if reserved is None else Footprint(reserved, "cuda_allocator")

    def reset_peak(self) -> None:
        """Return cached blocks to the device and let the allocator's peaks start again."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def _read_allocator(self) -> Readings:
        stats = torch.cuda.memory_stats_as_nested_dict(self._device) if torch.cuda.is_initialized() else {}
        readings: Readings = {}
        for name, key in (("allocated", "allocated_bytes"), ("reserved", "reserved_bytes")):
            pool = stats.get(key, {}).get("all", {})
            readings[f"cuda_{name}"] = pool.get("current")
            readings[f"cuda_peak_{name}"] = pool.get("peak")
        return readings

    def _nvml_device(self) -> nvml.NvmlDevice | None:
        """The device in NVML, from the moment on that it can be told which it is."""
        if self._use_nvml and self._nvml is None and (selector := self._selector()) is not None:
            self._nvml = nvml.open_device(selector)
            if self._nvml is None:
                self._use_nvml = False  # open_device said why, once is enough
            else:
                self._baseline = self._baselines.get(self._nvml.uuid, self._late_baseline(self._nvml))
        return self._nvml

    def _selector(self) -> str | int | None:
        """What singles out the device; None while only a number could, since CUDA and NVML count differently."""
        uuid = None
        if initialized := torch.cuda.is_initialized():
            uuid = getattr(torch.cuda.get_device_properties(self._device), "uuid", None)
        selector = nvml.device_selector(self._device.index or 0, None if uuid is None else str(uuid))
        return selector if initialized or isinstance(selector, str) else None

    def _late_baseline(self, device: nvml.NvmlDevice) -> int | None:
        """What others use now: a MIG device's baseline, or any if CUDA came first."""
        memory = device.memory()
        if memory is None:
            return None
        return memory.used - (torch.cuda.memory_reserved(self._device) if torch.cuda.is_initialized() else 0)
