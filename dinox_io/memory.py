"""What memory is free, on the machine and within our cgroup, before any is taken; and taking it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

Allocate = Callable[[int], np.ndarray]
"""Bytes -> uint8 memory of at least that many: plain, or pinned for a device."""


def plain_memory(size: int) -> np.ndarray:
    """uint8 (size,), not yet touched."""
    return np.empty(size, np.uint8)


def taken(size: int, allocate: Allocate) -> np.ndarray:
    """uint8 (size,) of `allocate`. MemoryError where it is not free; ValueError for memory that will not do."""
    check_memory(size)
    memory = allocate(size)
    if memory.dtype != np.uint8 or memory.ndim != 1 or memory.size < size or not memory.flags.c_contiguous:
        raise ValueError(f"the memory given is {memory.dtype} {memory.shape}, not contiguous uint8 of {size} bytes")
    return memory[:size]


def check_memory(needed_bytes: int) -> None:
    """MemoryError, with both figures, if the slabs cannot fit into what is free now (or into the cgroup's limit)."""
    free_bytes = free_memory_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        raise MemoryError(
            f"the loader's slabs need {needed_bytes / 2**20:.0f} MiB and {free_bytes / 2**20:.0f} MiB are free: lower "
            "prefetch_bytes, the batch size, the depth of a window, or raise parts (the trainer's accumulation)"
        )


def free_memory_bytes() -> int | None:
    """What the machine, and the limit of our cgroup if there is one, leave; None where the system does not tell."""
    free = [_available_bytes(), _group_free_bytes(Path("/sys/fs/cgroup"))]
    return min((size for size in free if size is not None), default=None)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _group_free_bytes(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        used = {name: int(size) for name, size in (line.split() for line in lines)}
        current = int((group / "memory.current").read_text(encoding="ascii"))
        # Cached files (the shards we read, say) count as used, but give way; shared memory among them does not.
        return None if limit == "max" else int(limit) - (current - used["file"] + used["shmem"])
    except (OSError, ValueError, KeyError):
        return None
