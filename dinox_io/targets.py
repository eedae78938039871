"""Which marks mean the same thing: nodules, where several readers marked each in their own way.

Invariant: the grouping depends on the marks alone, not on their order.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dinox_io.geometry import SAME_POSITION_MM
from dinox_io.labels import Mark, MarkMask


def group_targets(marks: Sequence[Mark]) -> list[Mark]:
    """The same marks, in their order, with one target for all marks of one thing: the smallest of theirs.

    Two marks of one series and one label are of one thing if they overlap: if they share a voxel, or, where one of them
    has no mask, if their boxes meet in z (mm), rows and columns. This is transitive: what overlaps with one mark of a
    thing belongs to it. Marks that have a target in common already stay together, in whatever series.
    """
    parent = list(range(len(marks)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    by_target: dict[int, int] = {}
    by_place: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, mark in enumerate(marks):
        parent[number] = root(by_target.setdefault(mark.target, number))
        by_place[mark.series, mark.label].append(number)
    for numbers in by_place.values():
        numbers.sort(key=lambda number: marks[number].box)
        for place, first in enumerate(numbers):
            for second in numbers[place + 1 :]:
                if marks[second].box[0] > marks[first].box[3] + SAME_POSITION_MM:
                    break  # sorted by the lower z: none of the rest reaches down to the first
                if overlap(marks[first], marks[second]):
                    parent[root(second)] = root(first)
    target: dict[int, int] = {}
    for number, mark in enumerate(marks):
        target[root(number)] = min(mark.target, target.get(root(number), mark.target))
    return [dataclasses.replace(mark, target=target[root(number)]) for number, mark in enumerate(marks)]


def overlap(a: Mark, b: Mark) -> bool:
    """Whether two marks of one series share a voxel, or, where one has no mask, whether their boxes meet."""
    low = [max(edges) for edges in zip(a.box[:3], b.box[:3], strict=True)]
    high = [min(edges) for edges in zip(a.box[3:], b.box[3:], strict=True)]
    if low[0] > high[0] + SAME_POSITION_MM or low[1] >= high[1] or low[2] >= high[2]:
        return False
    if a.mask is None or b.mask is None:
        return True
    rows_a, rows_b = _same_slices(a.mask, b.mask)
    if not len(rows_a):
        return False
    y, x, y_end, x_end = int(low[1]), int(low[2]), int(high[1]), int(high[2])
    parts = [
        mark.mask.decode()[rows, y - mark.box[1] : y_end - mark.box[1], x - mark.box[2] : x_end - mark.box[2]]
        for mark, rows in ((a, rows_a), (b, rows_b))
        if mark.mask is not None
    ]
    return bool((parts[0] & parts[1]).any())


def _same_slices(a: MarkMask, b: MarkMask) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the slices of both masks that lie at the same z."""
    gaps = np.abs(np.array(a.z_mm)[:, None] - np.array(b.z_mm)[None, :])
    rows_a, rows_b = np.nonzero(gaps <= SAME_POSITION_MM)
    return rows_a, rows_b
