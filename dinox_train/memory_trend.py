"""Whether the memory of the host that a run takes grows."""

from __future__ import annotations

from collections import deque

import numpy as np
import psutil

_LONGEST, _SHORTEST = 1024, 32
"""Updates that a trend looks back over, and with fewer there is none."""


def host_memory_bytes() -> int:
    """Resident memory of this process, bytes."""
    return psutil.Process().memory_info().rss


class MemoryTrend:
    """The slope of a straight line through the last figures of the host's memory: what leaks has one that stays."""

    def __init__(self) -> None:
        self._figures: deque[tuple[int, int]] = deque(maxlen=_LONGEST)

    def add(self, update: int, bytes_now: int) -> float | None:
        """Bytes an update, over the last 1024 at most; None until there are 32."""
        self._figures.append((update, bytes_now))
        if len(self._figures) < _SHORTEST:
            return None
        at, size = np.array(self._figures, np.float64).T
        at -= at.mean()
        return float(at @ (size - size.mean()) / (at @ at))
