"""One reading of the machine: the GPU that trains, its memory, the host, this process, the disk of the run folder.

Invariant: a figure that cannot be read is None and stops no other; nothing here waits for what the GPU is doing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from dinox_io.memory import free_memory_bytes
from dinox_train.watch.amd import amd_folder, read_amd
from dinox_train.watch.gpu import GPUFigures, pci_address
from dinox_train.watch.host import Host
from dinox_train.watch.nvidia import Nvml

FIGURES = (
    *("gpu_busy", "gpu_memory_allocated_bytes", "gpu_memory_reserved_bytes", "gpu_memory_free_bytes"),
    *("gpu_temperature_c", "gpu_power_w", "gpu_clock_mhz", "gpu_throttled"),
    *("host_free_bytes", "swap_used_bytes", "pressure_memory", "pressure_io", "pressure_cpu"),
    *("cpu_busy", "loader_cpu_share", "cpu_temperature_c", "disk_free_bytes"),
)
"""Of a reading, in the order in which they stand in a line of RUN/system.jsonl."""

Read = Callable[[], Any]


class Machine:
    """The machine of a run on `device` that writes into `folder`."""

    def __init__(self, device: torch.device, folder: Path, host: Host | None = None, gpu: Read | None = None) -> None:
        """host, gpu: for tests; None: this machine's. gpu gives GPUFigures."""
        self._device, self._folder, self._host = device, folder, host or Host()
        self._gpu = gpu or gpu_reader(device)

    def read(self) -> dict[str, float | int | bool | None]:
        """The value of each of FIGURES. Shares of time are of the time since the reading before."""
        gpu, host = self._gpu_figures(), self._host
        readings: tuple[Read, ...] = (
            *(lambda: gpu.busy, self._allocated, self._reserved, lambda: gpu.free_bytes),
            *(lambda: gpu.temperature_c, lambda: gpu.power_w, lambda: gpu.clock_mhz, lambda: gpu.throttled),
            *(free_memory_bytes, host.swap_used_bytes),
            *(lambda: host.pressure("memory"), lambda: host.pressure("io"), lambda: host.pressure("cpu")),
            *(host.cpu_busy, host.loader_cpu_share, host.cpu_temperature_c, self._disk_free),
        )
        return {name: _tried(read) for name, read in zip(FIGURES, readings, strict=True)}

    def _gpu_figures(self) -> GPUFigures:
        try:
            return self._gpu()
        except Exception:
            return GPUFigures()

    def _allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None

    def _reserved(self) -> int | None:
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else None

    def _disk_free(self) -> int:
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize


def gpu_reader(device: torch.device) -> Callable[[], GPUFigures]:
    """What reads the GPU of `device`; a CPU, and a GPU whose driver tells nothing (within WSL, say), has no figures."""
    if device.type != "cuda":
        return GPUFigures
    properties = torch.cuda.get_device_properties(device)
    address = pci_address(properties)
    if torch.version.hip:
        folder, shared = amd_folder(address), bool(properties.is_integrated)
        return GPUFigures if folder is None else lambda: read_amd(folder, shared)
    try:
        return Nvml(address, str(properties.uuid)).read
    except OSError:
        return GPUFigures


def host_bytes() -> int:
    """Memory of the host, bytes."""
    return psutil.virtual_memory().total


def _tried(read: Read) -> Any:
    try:
        return read()
    except Exception:
        return None
