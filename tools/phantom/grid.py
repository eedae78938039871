"""Where the pixels of a reconstruction lie in the body, and painting on them with soft edges.

A canvas holds one slice in HU; every paint is `hu += coverage * (value - hu)`, so later paints cover earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phantom.tree import Segments

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
AIR_HU = -1000.0


@dataclass(frozen=True)
class Grid:
    """Pixel centres, float32: x (columns,) and y (rows,) in mm, spaced alike, the body's axis in the middle."""

    rows: int
    columns: int
    pixel_mm: float
    x: Array = field(init=False, repr=False)
    y: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, count in (("x", self.columns), ("y", self.rows)):
            centres = (np.arange(count) - (count - 1) / 2.0) * self.pixel_mm
            object.__setattr__(self, name, centres.astype(np.float32))

    def outside_circle(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The pixels (rows, columns) beyond the circle that a scanner reconstructs."""
        radius = min(self.rows, self.columns) / 2.0 * self.pixel_mm
        return self.x[None, :] ** 2 + self.y[:, None] ** 2 > radius**2


class Canvas:
    """A slice, or a rectangle of one, under the brush: hu float32 (rows, columns) at x (1, columns), y (rows, 1), mm.

    `edge_mm` is the width over which an edge blurs.
    """

    def __init__(self, x: Array, y: Array, hu: Array, *, pixel_mm: float, edge_mm: float) -> None:
        self.x, self.y, self.hu = x, y, hu
        self.pixel_mm, self.edge_mm = pixel_mm, edge_mm

    @classmethod
    def blank(cls, grid: Grid, edge_mm: float) -> Canvas:
        """A slice of air."""
        hu = np.full((grid.rows, grid.columns), AIR_HU, np.float32)
        return cls(grid.x[None, :], grid.y[:, None], hu, pixel_mm=grid.pixel_mm, edge_mm=edge_mm)

    def part(self, half_x: float, half_y: float) -> Canvas:
        """The rectangle about the body's axis (a soft edge added); painting on it paints on this."""
        x, y, hu = self.window((-half_x, -half_y), (half_x, half_y))
        return Canvas(x, y, hu, pixel_mm=self.pixel_mm, edge_mm=self.edge_mm)

    def coverage(self, distance: Any) -> Any:
        """How much of a pixel at a signed distance (mm) from a surface lies inside: 0 to 1."""
        return np.clip(0.5 - distance / self.edge_mm, 0.0, 1.0)

    def paint(self, coverage: Any, value: Any) -> None:
        """Cover the whole slice."""
        self.hu += (coverage * (value - self.hu)).astype(np.float32, copy=False)

    def window(self, low: tuple[float, float], high: tuple[float, float]) -> tuple[Array, Array, Array]:
        """What lies between two corners (x, y in mm, a soft edge added): its x, its y, a view of its HU."""
        edge = self.edge_mm
        columns = slice(*np.searchsorted(self.x[0], [low[0] - edge, high[0] + edge]).tolist())
        rows = slice(*np.searchsorted(self.y[:, 0], [low[1] - edge, high[1] + edge]).tolist())
        return self.x[:, columns], self.y[rows], self.hu[rows, columns]

    def ellipse(
        self,
        center: tuple[float, float],
        half: tuple[float, float],
        value: float,
        *,
        angle: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """An ellipse with half axes `half` (mm), turned by `angle` (radians, from x towards y)."""
        if min(half) <= 0.0:
            return
        reach = max(half) if angle else 0.0
        x, y, hu = self.window(
            (center[0] - max(half[0], reach), center[1] - max(half[1], reach)),
            (center[0] + max(half[0], reach), center[1] + max(half[1], reach)),
        )
        u, v = x - center[0], y - center[1]
        if angle:
            cosine, sine = float(np.cos(angle)), float(np.sin(angle))
            u, v = cosine * u + sine * v, cosine * v - sine * u
        radius = np.sqrt((u / half[0]) ** 2 + (v / half[1]) ** 2)
        hu += opacity * self.coverage((radius - 1.0) * min(half)) * (value - hu)

    def ball(
        self, center: tuple[float, float, float], half: tuple[float, float, float], z: float, value: float
    ) -> None:
        """The cut at height z through an ellipsoid with half axes `half` (mm)."""
        left = 1.0 - ((z - center[2]) / half[2]) ** 2
        if left > 0.0:
            scale = float(np.sqrt(left))
            self.ellipse(center[:2], (half[0] * scale, half[1] * scale), value)

    def tube(self, start: Any, end: Any, radius: float, z: float, value: float) -> None:
        """The cut at height z through a straight tube with round ends."""
        start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
        if not min(start[2], end[2]) - radius <= z <= max(start[2], end[2]) + radius:
            return
        low, high = np.minimum(start, end) - radius, np.maximum(start, end) + radius
        x, y, hu = self.window((low[0], low[1]), (high[0], high[1]))
        hu += self.coverage(segment_distance(x, y, z, start, end) - radius) * (value - hu)

    def tubes(self, segments: Segments, z: float, grow: float = 1.0) -> Array:
        """Coverage (rows, columns), float32, of many thin tubes, radii times `grow`; where they meet, the larger's."""
        out = np.zeros(self.hu.shape, np.float32)
        near = segments.crossing(z, self.edge_mm)
        if not len(near.radius):
            return out
        radius = near.radius * grow
        half = (np.abs(near.end - near.start)[:, :2].max(axis=1) / 2.0 + radius + self.edge_mm) / self.pixel_mm
        # Patches of one size can be drawn together; few sizes, so that a long tube does not widen all the others.
        size = 4 * np.ceil((2.0 * half + 1.0) / 4.0).astype(np.int64)
        for side in np.unique(size):
            chosen = size == side
            self._tube_patches(
                out.ravel(), Segments(near.start[chosen], near.end[chosen], radius[chosen]), int(side), z
            )
        return out

    def _tube_patches(self, out: Array, segments: Segments, side: int, z: float) -> None:
        """Draw tubes into `out` (rows · columns,) by square patches of `side` pixels about their middles."""
        middle = (segments.start + segments.end)[:, :2] / 2.0
        column, row = (
            np.clip(
                np.rint((middle[:, k] - float(axis[0])) / self.pixel_mm).astype(np.int64)[:, None]
                + np.arange(side)
                - side // 2,
                0,
                len(axis) - 1,
            )
            for k, axis in enumerate((self.x[0], self.y[:, 0]))
        )
        x, y = self.x[0][column][:, None, :], self.y[:, 0][row][:, :, None]
        start, end = (part.T[:, :, None, None].astype(np.float32) for part in (segments.start, segments.end))
        radius = segments.radius.astype(np.float32)[:, None, None]
        # A tube thinner than the edge's width covers only part of a pixel, however close that lies to its axis.
        thin = np.minimum(1.0, 2.2 * radius / self.edge_mm)
        cover = thin * self.coverage(segment_distance(x, y, z, start, end) - radius)
        place = row[:, :, None] * self.x.shape[1] + column[:, None, :]
        np.maximum.at(out, place.ravel(), cover.astype(np.float32).ravel())


def segment_distance(x: Any, y: Any, z: float, start: Any, end: Any) -> Any:
    """Distance (mm) of the points (x, y, z) to the straight line from `start` to `end` (three coordinates first)."""
    ax, ay, az = end[0] - start[0], end[1] - start[1], end[2] - start[2]
    px, py, pz = x - start[0], y - start[1], z - start[2]
    length = np.maximum(ax * ax + ay * ay + az * az, 1e-6)
    t = np.clip((px * ax + py * ay + pz * az) / length, 0.0, 1.0)
    return np.sqrt((px - t * ax) ** 2 + (py - t * ay) ** 2 + (pz - t * az) ** 2)
