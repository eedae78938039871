"""Intervals by resampling patients: slices and findings of one patient are no independent observations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from probing import protocol

DIGITS = 6
"""Of figures in probe.json: beyond them lies rounding."""
BLOCK = 50
"""Draws that are looked at together: of a large task, the weights of all would fill the memory."""


@dataclass(frozen=True)
class Interval:
    """A figure and the percentile interval around it; None: not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def json(self) -> dict[str, Any]:
        """As it stands in probe.json."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value:.3f} [–]"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Resamples:
    """How often each of some patients is in each of RESAMPLES draws with replacement; the same for equal patients."""

    def __init__(self, patients: np.ndarray, seed: int) -> None:
        """patients: str (n,), the patient of each row that will be weighted."""
        names, self._row = np.unique(patients, return_inverse=True)
        count = len(names)
        drawn = protocol.generator(seed, "bootstrap").integers(0, max(count, 1), (protocol.RESAMPLES, count))
        self._counts = np.zeros((protocol.RESAMPLES, count))
        np.add.at(self._counts, (np.arange(protocol.RESAMPLES)[:, None], drawn), 1)
        self.patients = count

    def of(self, figure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """float64 (RESAMPLES,): a figure under every draw. figure: weights (r, n) of the rows to figures (r,)."""
        blocks = np.split(self._counts, range(BLOCK, len(self._counts), BLOCK))
        return np.concatenate([figure(block[:, self._row]) for block in blocks])

    def interval(self, value: float, resampled: np.ndarray) -> Interval:
        """The figure, and the percentiles of what the draws give. No interval for one patient, or where a figure is
        not defined in half of the draws or more: it would be one of the lucky draws."""
        if not np.isfinite(value):
            return Interval(None)
        defined = resampled[np.isfinite(resampled)]
        if self.patients < 2 or 2 * len(defined) <= len(resampled):
            return Interval(round(value, DIGITS))
        tail = 50 * (1 - protocol.COVERAGE)
        low, high = np.percentile(defined, [tail, 100 - tail])
        return Interval(round(value, DIGITS), round(float(low), DIGITS), round(float(high), DIGITS))

    def mean(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean of rows (n,), and that of each draw."""
        return float(values.mean()), self.of(lambda weights: weights @ values / weights.sum(axis=1))
