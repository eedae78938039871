"""What a kernel moves and computes: bytes that must cross the memory bus, and arithmetic, counted from shapes alone.

Every file of kernels counts its own, for the kernel and for the same work in eager torch. Bytes are a floor: each
tensor that a launch reads or writes counts once for each pass over it, as if caches held nothing from one launch to
the next and everything within one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Of one call; calls add up: `forward + backward`, `sum(parts, Traffic())`."""

    read_bytes: int = 0
    written_bytes: int = 0
    flops: int = 0
    """Floating-point operations; a multiply and an add are two."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read_bytes + other.read_bytes, self.written_bytes + other.written_bytes, self.flops + other.flops
        )

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least time it can take on a machine of these peaks (roofline): bytes and arithmetic overlap."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)
