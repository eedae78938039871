"""Verdicts on slices that lie in order but make no volume: what their steps and what changes along them tell.

Invariant: pure functions of plain values, ascending along the normal; lengths in mm.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise

from dinox_io import geometry
from dinox_io.rules import Refused


def check_interleaved(*facts: Sequence[Hashable]) -> None:
    """Refuse phases or reconstructions between each other: by their positions alone they look like one finer volume.

    `facts`: of each fact (acquisition, kernel) the values of all slices. Slices scanned again, and slabs that overlap
    at their borders, change it there and back: that passes. Raises Refused INTERLEAVED.
    """
    for values in facts:
        stretches = 1 + sum(a != b for a, b in pairwise(values))
        if stretches > 2 * len(set(values)):
            raise Refused("INTERLEAVED", count=len(set(values)))


def irregular(heights: Sequence[float]) -> Refused:
    """Why steps are not all the mean step: SLICE_GAP or VARIABLE_SPACING."""
    steps = [b - a for a, b in pairwise(heights)]
    usual = sorted(steps)[len(steps) // 2]
    odd = [index for index, step in enumerate(steps) if not geometry.same_step(step, usual)]
    # A missing slice leaves a step of a whole number of steps among equal ones; anything else is a change of spacing.
    whole = all(round(steps[i] / usual) >= 2 and abs(steps[i] / usual % 1 - 0.5) > 0.45 for i in odd)
    if odd and whole and len(odd) * 2 < len(steps):
        first = odd[0]
        return Refused("SLICE_GAP", count=len(odd), z_mm=heights[first], step_mm=steps[first], usual_mm=usual)
    return Refused("VARIABLE_SPACING", low_mm=min(steps), high_mm=max(steps))
