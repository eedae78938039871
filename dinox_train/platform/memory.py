"""How much of a shared memory a run may take: on a GPU without memory of its own, what it takes the host has not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dinox_train.platform.facts import Facts

HOST_RESERVE = 13 * 2**30
"""Bytes that stay the host's: below, reclaiming pages stops the GPU's queues for seconds, or for good (halogen#85)."""
MOST = 0.9
"""Of the device's memory: drivers of such devices hang at the last tenth, where others raise an error
(unsloth#5301)."""


@dataclass(frozen=True)
class MemoryLimit:
    """What is allowed to torch's allocator."""

    fraction: float
    """Of the device's memory."""
    reason: str

    def words(self) -> str:
        return f"the allocator may take {self.fraction:.0%} of the device's memory: {self.reason}"


def limit_for(facts: Facts) -> MemoryLimit | None:
    """The limit on such a machine; None where the device has memory of its own, or is the CPU."""
    if not (facts.is_gpu and facts.unified):
        return None
    left = facts.host_memory_bytes - HOST_RESERVE
    share = left / facts.memory_bytes
    if share >= MOST:
        return MemoryLimit(MOST, "the memory is shared, and a full one hangs the driver")
    if share < 0.25:
        return MemoryLimit(0.25, "the memory is shared and small; the host keeps less than it should")
    return MemoryLimit(share, f"the memory is shared, and the host keeps {HOST_RESERVE / 2**30:.0f} GiB")


def apply(limit: MemoryLimit, device: torch.device) -> None:
    """Hold torch's allocator to the limit; beyond it, it raises an error that says so."""
    torch.cuda.set_per_process_memory_fraction(limit.fraction, device)
