"""How fast memory is copied: within the host, within the device, and between the two."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_HOST_BYTES, _DEVICE_BYTES, _ROUNDS = 64 << 20, 256 << 20, 5
UNIFIED_RATIO = 0.2
"""Copies between host and device that reach this share of the device's own say that the two use one memory: buses
between two memories are below it (PCIe 5 beside an H200: 0.01; NVLink-C2C beside a GH200: 0.1)."""


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """10^9 bytes a second; of a copy within a memory, bytes read and bytes written both count."""

    host: float
    device: float | None = None
    to_device: float | None = None
    """From plain memory."""
    to_device_pinned: float | None = None
    from_device: float | None = None

    @property
    def looks_unified(self) -> bool | None:
        """Whether copies are as fast as within one memory; None for a CPU."""
        if self.device is None or self.to_device is None:
            return None
        return max(self.to_device, self.to_device_pinned or 0.0) >= UNIFIED_RATIO * self.device

    @property
    def pinning_gain(self) -> float | None:
        """How many times faster a copy to the device is from pinned memory; None: it was not measured."""
        if not self.to_device or self.to_device_pinned is None:
            return None
        return self.to_device_pinned / self.to_device

    def words(self) -> str:
        """For the log."""
        named = ((name.replace("_", " "), rate) for name, rate in asdict(self).items() if rate is not None)
        return "copies, GB/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in named)


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Of the host, and of `device` where it is a GPU. Takes 0.1 s on a CPU."""
    host, there = _pair(_HOST_BYTES, torch.device("cpu"))
    host_rate = 2 * _HOST_BYTES / _seconds(lambda: there.copy_(host), device) / 1e9
    if device.type == "cpu":
        return Bandwidth(host=host_rate)
    one, other = _pair(_DEVICE_BYTES, device)
    pinned, small = host.pin_memory(), one[:_HOST_BYTES]
    return Bandwidth(
        host=host_rate,
        device=2 * _DEVICE_BYTES / _seconds(lambda: other.copy_(one), device) / 1e9,
        to_device=_HOST_BYTES / _seconds(lambda: small.copy_(host), device) / 1e9,
        to_device_pinned=_HOST_BYTES / _seconds(lambda: small.copy_(pinned, non_blocking=True), device) / 1e9,
        from_device=_HOST_BYTES / _seconds(lambda: host.copy_(small), device) / 1e9,
    )


def _pair(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two buffers whose pages are there."""
    return torch.ones(size, dtype=torch.uint8, device=device), torch.zeros(size, dtype=torch.uint8, device=device)


def _seconds(copy: Callable[[], object], device: torch.device) -> float:
    """The best of some rounds, after one that is not counted."""
    best_s = float("inf")
    for number in range(_ROUNDS + 1):
        _wait(device)
        begin_s = time.perf_counter()
        copy()
        _wait(device)
        if number:
            best_s = min(best_s, time.perf_counter() - begin_s)
    return best_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
