"""Verdicts on slices that lie in order but make no volume: what their steps and what changes along them tell.

Invariant: pure functions of plain values, ascending along the normal; lengths in mm.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise

from dinox_io import geometry
from dinox_io.rules import Refused

ALTERNATING_MAX = 4
"""Most phases or reconstructions that are looked for between each other."""


def check_alternating(*facts: Sequence[Hashable]) -> None:
    """Refuse phases or reconstructions between each other: by their positions alone they look like one finer volume.

    `facts`: of each fact the values of slices with equal steps. Refused are 2 to 4 values that take turns, each at
    least twice: the slices of each are a regular volume of coarser steps. A value that changes once, in blocks or with
    every slice passes, and so does any noise. Raises Refused INTERLEAVED.
    """
    for values in facts:
        count = len(set(values))
        turns = all(value == values[index % count] for index, value in enumerate(values))
        if 2 <= count <= ALTERNATING_MAX and 2 * count <= len(values) and turns:
            raise Refused("INTERLEAVED", count=count)


def levels(values: Sequence[float | None]) -> list[float | None]:
    """Each length as the least one that it equals but for noise (`geometry.same_step`)."""
    found: list[float] = []
    for value in sorted({value for value in values if value is not None}):
        if not found or not geometry.same_step(value, found[-1]):
            found.append(value)
    return [None if value is None else max(level for level in found if level <= value) for value in values]


def check_interleaved(*facts: Sequence[Hashable]) -> None:
    """Refuse what changes to and fro too often to be slabs, whatever its order; as `check_alternating` otherwise.

    `facts`: acquisition and kernel of all slices. Slices scanned again, and slabs that overlap at their borders,
    change it there and back: that passes. Raises Refused INTERLEAVED.
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
