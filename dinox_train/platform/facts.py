"""What a device is, asked of torch and the system: kind, architecture, memory of its own or shared with the host.

Names of products decide nothing here; they are for people.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dinox_model.kernels.architecture import architecture


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one device and its host."""

    kind: Literal["cpu", "nvidia", "amd"]
    architecture: str
    """As the kernels' tables have it: sm_90, gfx1151, cpu."""
    name: str
    memory_bytes: int
    """That the device can have; of the host, for a CPU."""
    host_memory_bytes: int
    unified: bool
    """Host and device use one memory."""
    units: int
    """Multiprocessors or compute units; threads of torch, for a CPU."""
    torch: str
    runtime: str | None
    """Version of CUDA or ROCm that torch was built for."""
    system: str

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"

    @property
    def is_rdna(self) -> bool:
        """An AMD GPU of the gfx10, 11 or 12 families: those with WMMA or none, as opposed to Instinct's MFMA."""
        return self.kind == "amd" and self.architecture.startswith(("gfx10", "gfx11", "gfx12"))

    def key(self) -> dict[str, str | int]:
        """What a measurement depends on: another value of any of these, and it is made anew."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "memory_gib": round(self.memory_bytes / 2**30),
            "units": self.units,
            "torch": self.torch,
            "runtime": self.runtime or "none",
            "system": self.system,
        }

    def words(self) -> str:
        """For the log."""
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        if self.is_gpu:
            memory += ", shared with the host" if self.unified else ", its own"
        return f"{self.name} ({self.architecture}), {memory}, torch {self.torch}"

    def record(self) -> dict[str, Any]:
        """For env.json."""
        return asdict(self)


def find(device: torch.device) -> Facts:
    """The facts of `device`."""
    common = {"host_memory_bytes": _host_memory(), "torch": torch.__version__, "system": platform.release()}
    if device.type == "cpu":
        return Facts(
            kind="cpu",
            architecture="cpu",
            name=_cpu_name(),
            memory_bytes=common["host_memory_bytes"],
            unified=True,
            units=torch.get_num_threads(),
            runtime=None,
            **common,
        )
    properties = torch.cuda.get_device_properties(device)
    return Facts(
        kind="amd" if torch.version.hip else "nvidia",
        architecture=architecture(device),
        name=properties.name,
        memory_bytes=properties.total_memory,
        unified=bool(properties.is_integrated),
        units=properties.multi_processor_count,
        runtime=torch.version.hip or torch.version.cuda,
        **common,
    )


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
