"""Losses that leap: an event for each, so that it is found again when a run has gone bad.

Invariant: what is said depends on the updates alone, not on where a run was stopped and resumed (`state`).
"""

from __future__ import annotations

import statistics
from typing import Any

TIMES = 10.0
"""A loss so many times the median of those before it is a spike."""
WINDOW, FEWEST = 100, 10
"""Of how many updates the median is, and from how many on it says something."""


class LossSpikes:
    """Looks at the loss of each update that was applied."""

    def __init__(self) -> None:
        self._lately: list[float] = []
        self._high = False
        """Whether the last one was a spike: said once, until it is lower."""

    def add(self, update: int, loss: float) -> str | None:
        """Update number `update` was applied with a finite `loss`; a sentence where that is a spike."""
        median = statistics.median(self._lately) if len(self._lately) >= FEWEST else 0.0
        before, self._high = self._high, median > 0 and loss > TIMES * median
        self._lately = [*self._lately[1 - WINDOW :], loss]
        if before or not self._high:
            return None
        return (
            f"update {update} had a loss of {loss:.4g}, the median of those before it is {median:.4g}. If figures stay "
            "bad, stop, delete the checkpoints after it and go on from the one before (same command), or start anew "
            "with a lower optimizer.learning_rate"
        )

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"lately": list(self._lately), "high": self._high}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Be what `state` gave; None, of a checkpoint older than this: no loss was seen."""
        if state is not None:
            self._lately, self._high = list(state["lately"]), state["high"]
