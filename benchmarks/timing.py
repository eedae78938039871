"""One contender's timed rounds: warm-up, how often a run is repeated in a round, and the clock around it.

Invariant: standard library only, and nothing of dinox: this file also runs in the interpreter of the peers.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Clock = Callable[[], float]
Run = Callable[[], float]
"""Does the work once; returns how much it was, in the unit of the benchmark (bytes, windows, updates …)."""


class Sample(NamedTuple):
    """One round of one contender: s, and the amount of work done in them."""

    seconds: float
    amount: float


class Prepared(NamedTuple):
    """A contender that is ready to run, and what its setup found out (bytes it takes, say), as JSON values."""

    run: Run
    facts: dict[str, Any]
    before: Callable[[], None] | None = None
    """Called before each round, outside of its time (empties the page cache, say); a round is then a single run."""


Setup = Callable[[], Prepared]


class TimedRun:
    """Times a run; a short one is repeated, so that a round lasts long enough for the clock and the scheduler."""

    def __init__(self, run: Run, clock: Clock = time.perf_counter, before: Callable[[], None] | None = None) -> None:
        self._run, self._clock, self._before, self._repeats = run, clock, before, 1

    def warm_up(self, round_s: float) -> None:
        """Two runs that do not count; the second one says how many of them last `round_s`."""
        self._run()
        begin = self._clock()
        self._run()
        if self._before is None:
            self._repeats = max(1, math.ceil(round_s / max(self._clock() - begin, 1e-6)))

    def round(self) -> Sample:
        """One round; the garbage collector waits until it is over."""
        if self._before is not None:
            self._before()
        collecting = gc.isenabled()
        gc.disable()
        try:
            begin = self._clock()
            amount = sum(self._run() for _ in range(self._repeats))
            return Sample(self._clock() - begin, amount)
        finally:
            if collecting:
                gc.enable()
