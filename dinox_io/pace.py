"""The pace of decoding: how many threads are at it, and how many bytes a second they may move.

On a machine whose processor and accelerator share one memory, every byte that is moved too early is taken from the
training step. So the number of active threads follows the demand: one more when the consumer had to wait, one fewer
when it found all batches ready; and a cap in bytes a second may be set.

Invariant: the pace changes when a batch is ready, never what it holds. Called with the pipeline's lock held.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """How fast `threads` decoders may go; thread number 0 is always active."""

    def __init__(
        self, threads: int, max_bytes_per_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """max_bytes_per_s: of decoded data. ValueError for less than one thread, or a cap that is not above 0."""
        if threads < 1:
            raise ValueError(f"threads is {threads}; at least 1 must decode")
        if max_bytes_per_s is not None and not max_bytes_per_s > 0:
            raise ValueError(f"the cap is {max_bytes_per_s} bytes/s; it must be above 0")
        self.threads = self.active = threads
        self._rate, self._clock = max_bytes_per_s, clock
        self._free_at_s = 0.0
        self._calm = 0

    def asked(self, *, has_come: bool, full: bool) -> None:
        """The consumer asks for a batch: has it come already, and are all that may be made ahead made?"""
        if not has_come:
            self.active, self._calm = min(self.active + 1, self.threads), 0
        elif full:
            # A single calm moment is chance: as many in a row as there are threads at work are not.
            self._calm += 1
            if self._calm >= 2 * self.active:
                self.active, self._calm = max(self.active - 1, 1), 0
        else:
            self._calm = 0

    def delay_s(self, number: int) -> float | None:
        """How long thread `number` has to wait before it begins anything: 0, seconds, or None: until it is told."""
        if number >= self.active:
            return None
        return max(self._free_at_s - self._clock(), 0.0) if self._rate else 0.0

    def began(self, size: int) -> None:
        """`size` bytes of decoded data are under way."""
        if self._rate:
            self._free_at_s = max(self._free_at_s, self._clock()) + size / self._rate
