"""What readers marked, one finding for all marks of one target in one volume: its voxels, its slice, its ratings.

A voxel is of a finding where at least half of the readers who outlined it have it in their masks (the 50 % consensus
that is usual for LIDC-IDRI); where no voxel has so many, where any has. Of marks without masks the boxes are taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinox_io import VolumeRecord
from dinox_io.placed import JoinedMarks, PlacedMark


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """One thing in one volume."""

    volume: int
    """Index in the set's volumes."""
    patient: str
    target: int
    labels: tuple[str, ...]
    """Of its marks."""
    ratings: dict[str, list[float]]
    """By name, of all readers who gave one."""
    slices: np.ndarray
    """int64 (s,), ascending."""
    corner: tuple[int, int]
    """Row and column of the mask's first pixel in the slice."""
    mask: np.ndarray
    """bool (s, rows, columns)."""
    is_outlined: bool
    """Whether the mask is made of masks; else of boxes."""
    spacing_mm: tuple[float, float, float]

    @property
    def center(self) -> int:
        """The slice that shows most of it; of equal ones the lowest."""
        return int(self.slices[self.mask.sum(axis=(1, 2)).argmax()])

    def on_slice(self, number: int, shape: tuple[int, int]) -> np.ndarray:
        """bool (y, x): its pixels on a slice of the volume, whose slices have y, x pixels."""
        pixels = np.zeros(shape, bool)
        row = int(np.searchsorted(self.slices, number))
        if row < len(self.slices) and self.slices[row] == number:
            (y, x), part = self.corner, self.mask[row]
            pixels[y : y + part.shape[0], x : x + part.shape[1]] = part
        return pixels

    def sizes(self) -> list[float]:
        """Volume (mm³), diameter of a ball of it, area of the largest slice (mm²), and extents along z, y, x (mm)."""
        dz, dy, dx = self.spacing_mm
        volume = float(self.mask.sum()) * max(dz, 1e-3) * dy * dx
        area = float(self.mask.sum(axis=(1, 2)).max()) * dy * dx
        extents = []
        for axis, step in ((0, max(dz, 1e-3)), (1, dy), (2, dx)):
            others = tuple(other for other in range(3) if other != axis)
            where = np.flatnonzero(self.mask.any(axis=others))
            extents.append(float(where[-1] - where[0] + 1) * step)
        return [volume, (6 * volume / np.pi) ** (1 / 3), area, *extents]


def findings_of(joined: JoinedMarks, volumes: Sequence[VolumeRecord], patients: set[str]) -> list[Finding]:
    """The findings of these patients, by volume and target."""
    found = []
    for number, marks in joined.by_volume.items():
        if volumes[number].patient not in patients:
            continue
        by_target: dict[int, list[PlacedMark]] = defaultdict(list)
        for mark in marks:
            by_target[mark.mark.target].append(mark)
        found += [_finding(volumes[number], target, by_target[target]) for target in sorted(by_target)]
    return found


def _finding(volume: VolumeRecord, target: int, marks: list[PlacedMark]) -> Finding:
    outlined = [mark for mark in marks if mark.mark.mask is not None]
    chosen = outlined or marks
    slices = np.unique(np.concatenate([mark.slices for mark in chosen]))
    boxes = np.array([mark.mark.box for mark in chosen])
    y, x = (int(edge) for edge in boxes[:, 1:3].min(axis=0))
    y_end, x_end = (int(edge) for edge in boxes[:, 4:6].max(axis=0))
    votes = np.zeros((len(slices), y_end - y, x_end - x), np.int16)
    for mark in chosen:
        box = mark.mark.box
        rows = np.searchsorted(slices, mark.slices)
        votes[rows, box[1] - y : box[4] - y, box[2] - x : box[5] - x] += mark.mask() if outlined else True
    outside = not votes.any()  # the slices that the set lacks hold all that was outlined: the box says where it is
    votes += outside
    consensus = 2 * votes >= len(chosen)
    ratings: dict[str, list[float]] = defaultdict(list)
    for mark in marks:
        for name, value in mark.mark.ratings.items():
            ratings[name].append(float(value))
    return Finding(
        volume=volume.index,
        patient=volume.patient,
        target=target,
        labels=tuple(sorted({mark.mark.label for mark in marks})),
        ratings=dict(ratings),
        slices=slices,
        corner=(y, x),
        mask=consensus if consensus.any() else votes > 0,
        is_outlined=bool(outlined) and not outside,
        spacing_mm=volume.spacing_mm,
    )
