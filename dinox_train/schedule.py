"""Schedules: pure functions of the index of an update, from 0 (the first) to total - 1 (the last of the schedule).

Every schedule stays at its final value beyond its end, so that a run may go on for longer than its schedules.
"""

from __future__ import annotations

import math


def warmup_cosine(index: int, total: int, *, peak: float, final: float, warmup: int) -> float:
    """Linear rise over `warmup` updates, then half a cosine from `peak` to `final`.

    Update `warmup` - 1 is the first at the peak, update `total` - 1 is at `final`. The first update is not 0 but a
    `warmup`-th of the peak: an update that changes nothing would be wasted. A warm-up longer than the schedule is cut
    to it: the last update is then the first at the peak.
    """
    _check(index, total)
    warmup = min(warmup, total)
    if index < warmup:
        return peak * (index + 1) / warmup
    return cosine(index - warmup, total - warmup, start=peak, final=final) if total > warmup else peak


def cosine(index: int, total: int, *, start: float, final: float) -> float:
    """Half a cosine: `start` at index 0, `final` at `total` - 1 and beyond. A schedule of one update is at `start`."""
    _check(index, total)
    progress = min(index / max(total - 1, 1), 1.0)
    if progress == 1.0:
        return final  # exactly, as momentum 1 must be
    return final + (start - final) * (1.0 + math.cos(math.pi * progress)) / 2.0


def linear_ramp(index: int, length: int, *, start: float, final: float) -> float:
    """A straight line: `start` at index 0, `final` at index `length` and beyond. A ramp of length 0 is at `final`."""
    _check(index, 1)
    return final if index >= length else start + (final - start) * index / length


def _check(index: int, total: int) -> None:
    if index < 0 or total < 1:
        raise ValueError(f"updates are counted from 0 and a schedule has at least one; index {index} of {total}")
