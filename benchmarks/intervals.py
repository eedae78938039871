"""Medians and their intervals, without an assumption about how timings are distributed.

Invariant: an interval holds the median of the population with at least the confidence it names (order statistics: the
number of samples below the median is binomial with one half; David & Nagaraja, Order Statistics, 3rd ed., 7.1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A median with its interval, the quartiles of the samples, and how sure the interval is (0 to 1)."""

    value: float
    low: float
    high: float
    quartiles: tuple[float, float]
    confidence: float

    @property
    def noise(self) -> float:
        """For a ratio whose truth is 1: how far from it the interval reaches, as a fraction (0.02: 2 %)."""
        return max(max(x, 1 / x) - 1 for x in (self.low, self.high))

    def scaled(self, factor: float) -> Interval:
        """The same in another unit."""
        quartiles = (self.quartiles[0] * factor, self.quartiles[1] * factor)
        return Interval(self.value * factor, self.low * factor, self.high * factor, quartiles, self.confidence)


def median_interval(samples: Sequence[float]) -> Interval:
    """Median and interval of `samples`. With fewer than 6 the interval is all of them, and less sure.

    Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("no samples: nothing was measured")
    ordered, count = sorted(samples), len(samples)
    outside, missed = _left_out(count)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if count > 1 else [ordered[0]] * 3
    return Interval(
        value=statistics.median(ordered),
        low=ordered[outside],
        high=ordered[count - 1 - outside],
        quartiles=(quartiles[0], quartiles[2]),
        confidence=max(0.0, 1 - missed),
    )


def _left_out(count: int) -> tuple[int, float]:
    """How many samples at each end the interval leaves out, and the chance that it misses the median."""
    outside, ways = 0, 1  # ways: of `count` throws of a coin, those with at most `outside` heads
    while outside + 1 < count / 2:
        further = ways + math.comb(count, outside + 1)
        if 2 * further / 2**count > 1 - CONFIDENCE:
            break
        outside, ways = outside + 1, further
    return outside, 2 * ways / 2**count
