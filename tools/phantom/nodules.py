"""Nodules: lobulated blobs in the lungs, solid or ground-glass, their exact masks and their marks.

A nodule is a union of balls; a voxel belongs to its mask exactly when its centre lies in one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dinox_io.labels import Mark, mark_of_mask
from phantom.body import LUNG_SIDES, Body, points_in_lung
from phantom.grid import Grid

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
SOLID_HU = 35.0
GROUND_GLASS_HU = -520.0
# The scale for texture on which LIDC's readers score: 1 ground-glass, 5 solid.
TEXTURE = {False: 1, True: 5}


@dataclass(frozen=True)
class Nodule:
    """Balls: centres (n, 3) as x, y, z and radii (n,), mm; the first ball is the body, the others its lobes."""

    balls: Array
    radii: Array
    solid: bool

    @property
    def hu(self) -> float:
        return SOLID_HU if self.solid else GROUND_GLASS_HU

    @property
    def low(self) -> Array:
        return (self.balls - self.radii[:, None]).min(axis=0)

    @property
    def high(self) -> Array:
        return (self.balls + self.radii[:, None]).max(axis=0)

    def distance(self, x: Any, y: Any, z: Any) -> Any:
        """Signed distance in mm, negative inside (exact outside)."""
        gaps = [
            np.sqrt((x - bx) ** 2 + (y - by) ** 2 + (z - bz) ** 2) - radius
            for (bx, by, bz), radius in zip(self.balls, self.radii, strict=True)
        ]
        return np.minimum.reduce(gaps)


def draw_nodules(body: Body, count: int, z_range: tuple[float, float], random: np.random.Generator) -> list[Nodule]:
    """`count` nodules in the lungs whose centres lie in the z range (mm) that the patient's scan covers."""
    nodules: list[Nodule] = []
    for _ in range(count):
        radius = random.uniform(3.5, 11.0)
        solid = bool(random.uniform() < 0.65)
        side = LUNG_SIDES[int(random.integers(2))]
        candidates = points_in_lung(body, side, 64, 1.25 * radius + 2.0, random)
        inside = (candidates[:, 2] > z_range[0] + radius) & (candidates[:, 2] < z_range[1] - radius)
        apart = [all(np.linalg.norm(c - other.balls[0]) > 35.0 for other in nodules) for c in candidates]
        usable = candidates[inside & np.array(apart)]
        lobes = random.integers(0, 5)
        direction = random.standard_normal((lobes, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        share = random.uniform(0.45, 0.65, lobes)
        if len(usable):
            center = usable[0]
            balls = np.concatenate([center[None], center + 0.62 * radius * direction])
            nodules.append(Nodule(balls, radius * np.concatenate([[1.0], share]), solid))
    return nodules


def mark(nodule: Nodule, *, series: str, target: int, grid: Grid, z_mm: Array, offset_mm: float) -> Mark | None:
    """The label of a nodule in one series, by SeriesInstanceUID, or None where no voxel of the series lies in it.

    `z_mm` (slices,) ascending are the slices' heights in the body; `offset_mm` takes them to z in the files. `target`
    is the nodule's number, the same in all series.
    """
    rows = np.flatnonzero((grid.y >= nodule.low[1]) & (grid.y <= nodule.high[1]))
    columns = np.flatnonzero((grid.x >= nodule.low[0]) & (grid.x <= nodule.high[0]))
    slices = np.flatnonzero((z_mm >= nodule.low[2]) & (z_mm <= nodule.high[2]))
    x, y, z = grid.x[columns], grid.y[rows][:, None], z_mm[slices][:, None, None]
    mask = nodule.distance(x, y, z) <= 0.0
    if not mask.any():
        return None
    keep = [np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    first = [slice(k[0], k[-1] + 1) for k in keep]
    return mark_of_mask(
        mask[tuple(first)],
        z_mm=[round(float(height) + offset_mm, 3) for height in z_mm[slices][first[0]]],
        corner=(int(rows[keep[1][0]]), int(columns[keep[2][0]])),
        series=series,
        label="nodule",
        reader="phantom",
        target=target,
        ratings={"texture": TEXTURE[nodule.solid]},
    )
