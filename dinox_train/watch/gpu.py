"""What is read of a GPU beside torch, whoever made it, and where the system knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GPUFigures:
    """One reading; None: not readable here."""

    busy: float | None = None
    """Share of the driver's last interval in which something ran, 0 to 1: not how full the GPU was."""
    free_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    clock_mhz: float | None = None
    throttled: bool | None = None
    """The driver says that heat, or the supply of power, holds the clock down."""


def pci_address(properties: Any) -> str | None:
    """`0000:c5:00.0`: where torch's device properties say that the GPU sits; None where this torch does not say."""
    place = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if not all(isinstance(part, int) for part in place):
        return None
    domain, bus, device = place
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"
