"""Schedules: pure functions of the index of an update, from 0 (the first) to total - 1 (the last of the schedule).

Every schedule stays at its final value beyond its end, so that a run may go on for longer than its schedules.
"""

from __future__ import annotations

import math

SHAPES = ("cosine", "linear", "constant")
"""Of a learning rate after its warm-up."""
REFERENCE_BATCH = 1024


def learning_rate(index: int, total: int, *, peak: float, final: float, warmup: int, shape: str = "cosine") -> float:
    """Linear rise over `warmup` updates, then from `peak` to `final` by half a cosine or a straight line, or constant.

    Update `warmup` - 1 is the first at the peak, update `total` - 1 is at `final` (constant: at the peak still). The
    first update is not 0 but a `warmup`-th of the peak: an update that changes nothing would be wasted. Where the
    warm-up leaves one update, that one is at the peak as well, and only what comes beyond the schedule at `final`. A
    warm-up as long as the schedule or longer, cut to it, leaves none: then the rate stays at the peak. Raises
    ValueError for another shape.
    """
    _check(index, total)
    if shape not in SHAPES:
        raise ValueError(f"a schedule's shape is one of {', '.join(SHAPES)}, not {shape!r}")
    warmup = min(warmup, total)
    if index < warmup:
        return peak * (index + 1) / warmup
    if shape == "constant" or total == warmup:
        return peak
    if shape == "linear":
        return linear_ramp(index - warmup, max(total - warmup - 1, 1), start=peak, final=final)
    return cosine(index - warmup, total - warmup, start=peak, final=final)


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


def frozen_then_ramp(index: int, *, frozen: int, ramp: int) -> float:
    """0 for the first `frozen` updates, then `ramp` updates of a straight line, whose last is the first at 1."""
    _check(index, 1)
    if index < frozen:
        return 0.0
    return min((index - frozen + 1) / ramp, 1.0) if ramp else 1.0


def scaled_learning_rate(base: float, batch_size: int) -> float:
    """base x 4 x sqrt(batch_size / 1024): DINOv3's rule (its `base` is the rate of a batch of 64 images).

    Adam's steps do not grow with the gradient; noise of the gradient falls with the root of the batch.
    """
    return base * 4.0 * math.sqrt(batch_size / REFERENCE_BATCH)


def _check(index: int, total: int) -> None:
    if index < 0 or total < 1:
        raise ValueError(f"updates are counted from 0 and a schedule has at least one; index {index} of {total}")
