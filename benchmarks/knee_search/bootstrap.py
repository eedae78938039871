"""Rates and ratios of rates with 95 % intervals, by resampling runs and the updates in them.

A run's updates share what the run was lucky or unlucky with, so runs are drawn first, then updates in each (Davison &
Hinkley, Bootstrap Methods and their Application, 3.8). Invariant: the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS, CONFIDENCE = 1000, 0.95
Runs = Sequence[Sequence[float]]
"""Seconds of each update, run by run."""


@dataclass(frozen=True)
class Rate:
    """Windows a second with its interval."""

    value: float
    low: float
    high: float


def rate_of(runs: Runs, windows: int) -> Rate:
    """Of updates of so many windows each. ValueError without an update."""
    if not any(len(run) for run in runs):
        raise ValueError("no update was measured")
    value = windows / _mean(runs)
    means = windows / _resampled(runs, 0)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Rate(value, min(float(low), value), max(float(high), value))


def ratio_of(runs: Runs, windows: int, others: Runs, other_windows: int) -> Rate:
    """How many times the rate of `others`."""
    value = windows / _mean(runs) * _mean(others) / other_windows
    ratios = windows / _resampled(runs, 0) * _resampled(others, 1) / other_windows
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Rate(value, min(float(low), value), max(float(high), value))


def noise_of(repeated: Sequence[Runs]) -> float | None:
    """A/A: the largest relative difference between two runs of the same settings; None where none ran twice."""
    found = []
    for runs in repeated:
        means = [sum(run) / len(run) for run in runs if run]
        if len(means) > 1:
            found.append(max(means) / min(means) - 1)
    return max(found, default=None)


def _mean(runs: Runs) -> float:
    """Of all updates, runs counted by their lengths."""
    updates = [seconds for run in runs for seconds in run]
    return sum(updates) / len(updates)


def _resampled(runs: Runs, seed: int) -> np.ndarray:
    """float64 (DRAWS,): means of resampled updates."""
    random = np.random.default_rng(seed)
    arrays = [np.asarray(run, np.float64) for run in runs if len(run)]
    totals, counts = np.zeros(DRAWS), np.zeros(DRAWS, np.int64)
    for _ in arrays:
        chosen = random.integers(len(arrays), size=DRAWS)
        for number, updates in enumerate(arrays):
            draws = np.flatnonzero(chosen == number)
            drawn = updates[random.integers(len(updates), size=(len(draws), len(updates)))]
            totals[draws] += drawn.sum(1)
            counts[draws] += len(updates)
    return totals / counts
