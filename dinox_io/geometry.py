"""Where slices lie: directions, order along the normal, gaps, tilt. Pure functions of numbers; all lengths in mm.

Invariant: the slice normal's patient-z component is positive, and slices ascend along it (DICOM PS3.3 C.7.6.2.1.1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Vector = tuple[float, float, float]

SAME_POSITION_MM = 0.01
"""Positions closer than this are one position: scanners round to a micrometre, and no CT steps by a hundredth."""
STEP_TOLERANCE = 0.01
STEP_TOLERANCE_MM = 0.02
GAP_RATIO = 1.5
"""Steps that differ by this factor are different, however fine: 0.02 mm would hide a gap among steps of 0.03 mm."""
TILT_LIMIT_DEGREES = 0.5
AXIAL_LIMIT_DEGREES = 30.0
ORIENTATION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Plane:
    """Directions of an image: along a row (x), along a column (y), and the slice normal (z), unit vectors."""

    row: Vector
    column: Vector
    normal: Vector

    @property
    def cosines(self) -> tuple[float, ...]:
        """The 9 direction cosines: row, column, normal."""
        return (*self.row, *self.column, *self.normal)


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Scalar product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def plane(orientation: Sequence[float]) -> Plane:
    """Directions from the 6 cosines of ImageOrientationPatient; ValueError unless orthogonal unit vectors (within 1 %).

    The normal is row x column, its sign turned so that its patient-z component is positive.
    """
    row, column = tuple(orientation[:3]), tuple(orientation[3:])
    lengths = math.sqrt(dot(row, row)), math.sqrt(dot(column, column))
    if any(abs(length - 1) > 0.01 for length in lengths) or abs(dot(row, column)) > 0.01:
        raise ValueError("row and column directions are not orthogonal unit vectors")
    normal = (
        row[1] * column[2] - row[2] * column[1],
        row[2] * column[0] - row[0] * column[2],
        row[0] * column[1] - row[1] * column[0],
    )
    size = math.copysign(math.sqrt(dot(normal, normal)), normal[2])
    return Plane(_clean(row, lengths[0]), _clean(column, lengths[1]), _clean(normal, size))


def _clean(vector: Sequence[float], length: float) -> Vector:
    # + 0.0 turns -0.0 into 0.0; 1e-9 is far below what decimal strings of 16 characters hold.
    x, y, z = (round(value / length, 9) + 0.0 for value in vector)
    return x, y, z


def obliquity_degrees(directions: Plane) -> float:
    """Angle between the slice normal and the patient's z axis, 0 to 90."""
    return math.degrees(math.acos(min(1.0, directions.normal[2])))


def same_orientation(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two ImageOrientationPatient agree to what scanners round away."""
    return all(abs(x - y) <= ORIENTATION_TOLERANCE for x, y in zip(a, b, strict=True))


def height_mm(position: Sequence[float], directions: Plane) -> float:
    """Projection of ImagePositionPatient on the normal, to a nanometre."""
    return round(dot(position, directions.normal), 6) + 0.0


def position_groups(heights_mm: Sequence[float]) -> list[list[int]]:
    """Indices of slices that share a position; `heights_mm` ascending."""
    groups: list[list[int]] = []
    for index, height in enumerate(heights_mm):
        if groups and height - heights_mm[groups[-1][0]] < SAME_POSITION_MM:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def tilt_degrees(positions: Sequence[Vector], directions: Plane) -> float:
    """Angle between the slice normal and the direction of stacking; positions ascending, at least two."""
    stack = [last - first for first, last in zip(positions[0], positions[-1], strict=True)]
    along = dot(stack, directions.normal)
    across = math.hypot(dot(stack, directions.row), dot(stack, directions.column))
    return math.degrees(math.atan2(across, along))


def shift_mm(positions: Sequence[Vector], directions: Plane) -> float:
    """Largest in-plane distance of a slice's origin from the straight line through the first and the last origin."""
    first, last = positions[0], positions[-1]
    stack = [b - a for a, b in zip(first, last, strict=True)]
    total = dot(stack, directions.normal)
    worst = 0.0
    for position in positions:
        offset = [b - a for a, b in zip(first, position, strict=True)]
        part = dot(offset, directions.normal) / total if total else 0.0
        rest = [o - part * s for o, s in zip(offset, stack, strict=True)]
        worst = max(worst, math.hypot(dot(rest, directions.row), dot(rest, directions.column)))
    return worst


def step_mm(heights_mm: Sequence[float]) -> float:
    """Mean step between ascending slices, at least two."""
    return round((heights_mm[-1] - heights_mm[0]) / (len(heights_mm) - 1), 6)


def same_step(step: float, reference: float) -> bool:
    """Whether a step is the reference step: within max(1 %, 0.02 mm), and by less than half of the smaller one."""
    close = abs(step - reference) <= max(STEP_TOLERANCE * abs(reference), STEP_TOLERANCE_MM) + 1e-9
    return close and max(step, reference) < GAP_RATIO * min(step, reference) - 1e-9


def is_regular(heights_mm: Sequence[float]) -> bool:
    """Whether every step is the mean step, and none a gap beside the usual one; heights ascending. One is regular."""
    if len(heights_mm) < 2:
        return True
    mean = (heights_mm[-1] - heights_mm[0]) / (len(heights_mm) - 1)
    steps = sorted(b - a for a, b in pairwise(heights_mm))
    usual = steps[(len(steps) - 1) // 2]
    return steps[-1] < GAP_RATIO * usual - 1e-9 and all(same_step(step, mean) for step in steps)


def contiguous_runs(heights_mm: Sequence[float]) -> list[range]:
    """Disjoint runs of slices with equal steps, ascending, together all slices; every run `is_regular`.

    The longest run takes its slices first (then the finer step, then the lower one), so that the slice at the border
    of a slab belongs to the slab and not to the gap.
    """
    steps = [b - a for a, b in pairwise(heights_mm)]
    candidates: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(steps) + 1):
        if index == len(steps) or not same_step(steps[index], steps[start]):
            candidates.append((start, index))
            start = index
    candidates.sort(key=lambda pair: (pair[0] - pair[1], steps[pair[0]], pair[0]))
    owner = [-1] * len(heights_mm)
    for number, (first, last) in enumerate(candidates):
        for index in range(first, last + 1):
            if owner[index] < 0:
                owner[index] = number
    runs: list[range] = []
    for index in range(len(heights_mm)):
        same = runs and owner[index] == owner[runs[-1].start] and owner[index] >= 0
        # A run whose ends were taken by longer ones is still one stretch of equal steps.
        if same and is_regular([heights_mm[i] for i in range(runs[-1].start, index + 1)]):
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
