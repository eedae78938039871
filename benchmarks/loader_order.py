"""What the order of training costs, without pixels: to start, to resume, for each window, in memory; against its size.

Invariant: set sizes are virtual: a window is a number here, so a million of them need no disk.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from result import Figure, Result

from dinox_io.mixture import Mixture

BATCH_SIZE, RUN_LENGTH, SERIES_WINDOWS = 64, 8, 100
SIZES = (10**2, 10**4, 10**6)
INFLATIONS = (1, 10**3, 10**6)


def _mixture(windows: int, inflation: int = 1) -> Mixture:
    sizes = np.full(windows // SERIES_WINDOWS, SERIES_WINDOWS, np.int64)
    return Mixture([sizes], [1.0], batch_size=BATCH_SIZE, seed=0, inflation=inflation, run_length=RUN_LENGTH)


def _median_s(work: Callable[[int], Any], repeats: int) -> float:
    times = []
    for number in range(repeats):
        begin_s = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times)


def measure(made: Result, *, quick: bool) -> Figure:
    """Add the figures; gives the one of resuming at a million windows. Times in ms, medians on this thread."""
    repeats = 3 if quick else 25
    resuming: Figure | None = None
    for windows in SIZES:
        # A position of its own each time, in the middle of a pass: nothing of it can be known beforehand.
        resume_s = _median_s(lambda n, w=windows: _mixture(w).batch(1_234_567 + 97 * n), repeats)
        start_s = _median_s(lambda _, w=windows: _mixture(w).batch(0), repeats)
        mixture = _mixture(windows)
        steady_s = _median_s(mixture.batch, 16 * repeats) / BATCH_SIZE
        made.exact(f"order: start, {windows} windows", 1e3 * start_s, "ms", better="lower")
        resuming = made.exact(f"order: resume, {windows} windows", 1e3 * resume_s, "ms", better="lower")
        made.exact(f"order: each window, of {windows}", 1e6 * steady_s, "µs", better="lower")
    for inflation in INFLATIONS:
        peak = peak_bytes(inflation, 4 if quick else 200)
        made.exact(f"order: memory, 10000 windows × {inflation}", peak / 1e3, "kB", better="lower")
    assert resuming is not None
    return resuming


def peak_bytes(inflation: int, batches: int) -> int:
    """Most memory that the order of 10,000 windows held over some batches (tracemalloc counts NumPy's too)."""
    tracemalloc.start()
    try:
        mixture = _mixture(10_000, inflation)
        for position in range(batches):
            mixture.batch(position)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
