"""A storage of so many bytes a second, in the place of the one that is there: what if the shards lay on a slower one?

Invariant: what is read is the same; each read returns when a storage of that rate would have delivered it. The rate is
one for all threads and files of the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dinox_io.storage import LocalFile


class Throttle:
    """Delays reads, so that they come at `bytes_per_s` altogether."""

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """ValueError for a rate that is not above 0."""
        if not bytes_per_s > 0:
            raise ValueError(f"a storage of {bytes_per_s} bytes/s delivers nothing; it must be above 0")
        self._rate, self._clock, self._sleep = bytes_per_s, clock, sleep
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def read(self, size: int) -> None:
        """Wait until `size` more bytes have been delivered."""
        with self._lock:
            now_s = self._clock()
            self._free_at_s = max(self._free_at_s, now_s) + size / self._rate
            until_s = self._free_at_s - now_s
        self._sleep(until_s)


def slow_down(bytes_per_s: float) -> None:
    """From now on all reads of local shards in this process come at that rate."""
    throttle = Throttle(bytes_per_s)
    read_into = LocalFile.read_into

    def slowly(self: LocalFile, start: int, buffer: memoryview) -> None:
        read_into(self, start, buffer)
        throttle.read(len(buffer))

    LocalFile.read_into = slowly
