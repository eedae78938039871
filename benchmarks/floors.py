"""Physical floors: what no code can beat on this machine, measured in the same rounds as the contenders.

Invariant: a floor is a measured bandwidth and a count of bytes, never a figure from a data sheet.
"""

from __future__ import annotations

import numpy as np
from harness import Measurement
from intervals import Interval
from timing import Prepared, Setup


def copying(size_bytes: int) -> Setup:
    """Copies `size_bytes` from one buffer to another: each byte is read once and written once. Work: bytes copied.

    Of the size of a slice it runs in the caches, as decoding slice by slice does; of 256 MiB it runs in main memory.
    """

    def setup() -> Prepared:
        source = np.arange(size_bytes, dtype=np.uint8)
        target = np.empty_like(source)

        def run() -> float:
            np.copyto(target, source)
            return size_bytes

        return Prepared(run, {"buffer_bytes": size_bytes})

    return setup


def distance(measured: Measurement, name: str, floor: str, bytes_per_unit: float = 1.0) -> Interval:
    """How many times as long `name` takes as its bytes do at the bandwidth of the contender `floor`: 1 is the floor.

    `bytes_per_unit`: bytes that a unit of its work must move at least (its own work is counted in bytes: 1).
    """
    return measured.figure(lambda times: times[name] / (times[floor] * bytes_per_unit))
