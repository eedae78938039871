"""The shape of one phantom patient: a few drawn numbers, and the implicit surfaces that follow from them.

Coordinates are mm: x towards the patient's left, y towards the back, z towards the head, z = 0 at the lungs' lowest
point. A `distance` is signed, negative inside; it is close to the true distance near the surface only, which is all
that a soft edge needs. All functions are pure and broadcast over x, y, z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

LUNG_SIDES = (-1.0, 1.0)  # the patient's right, the patient's left
CHEST_POWER = 2.3  # of the superellipse that the inside of the chest is


@dataclass(frozen=True, kw_only=True)
class Body:
    """All lengths in mm, all values in HU."""

    width: float  # half width of the chest's inside at its base
    depth: float  # half depth of the chest's inside at its base
    lung_height: float
    fat: float  # under the skin
    muscle: float  # between the fat and the ribs' inside
    heart: float  # scale of the heart, 1 the usual
    dome_right: float  # height of the diaphragm
    dome_left: float
    lung_hu: float
    liver_hu: float
    rib_pitch: float
    phase: tuple[float, ...]  # 6 phases of slow waves in the lungs' density


def draw_body(random: np.random.Generator) -> Body:
    """A patient of believable size; about the spread between small women and large men."""
    size = random.uniform(0.86, 1.12)
    return Body(
        width=132 * size * random.uniform(0.96, 1.04),
        depth=88 * size * random.uniform(0.94, 1.06),
        lung_height=float(np.clip(252 * size * random.uniform(0.94, 1.06), 215, 290)),
        fat=random.uniform(6, 26),
        muscle=random.uniform(17, 25),
        heart=size * random.uniform(0.92, 1.12),
        dome_right=random.uniform(52, 72),
        dome_left=random.uniform(40, 56),
        lung_hu=random.uniform(-865, -825),
        liver_hu=random.uniform(48, 66),
        rib_pitch=random.uniform(21, 25) * size,
        phase=tuple(random.uniform(0, 2 * np.pi, 6).tolist()),
    )


def _weak(value: Any) -> Any:
    """A Python float where it is one number: unlike a NumPy scalar it leaves float32 grids float32."""
    return float(value) if np.ndim(value) == 0 else value


def smoothstep(low: float, high: float, value: Array | float) -> Any:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return _weak(t * t * (3.0 - 2.0 * t))


def ellipse_distance(x: Any, y: Any, half_x: Any, half_y: Any, power: float = 2.0) -> Any:
    """Signed distance (mm, approximate) to a superellipse about the origin."""
    if power == 2.0:
        radius = np.sqrt((x / half_x) ** 2 + (y / half_y) ** 2)
    else:
        radius = (np.abs(x / half_x) ** power + np.abs(y / half_y) ** power) ** (1.0 / power)
    return (radius - 1.0) * np.minimum(half_x, half_y)


def cage_half_axes(body: Body, z: Any) -> tuple[Any, Any]:
    """Half width and half depth of the chest's inside at height z: it narrows towards the apex of the lungs."""
    t = np.clip(z / body.lung_height, 0.0, 1.0)
    narrowing = np.sqrt(np.maximum(1.0 - t**4.2, 0.02))
    return _weak(body.width * narrowing), _weak(body.depth * narrowing**0.85)


def outer_half_axes(body: Body, z: float) -> tuple[float, float]:
    """Half axes of the skin at height z: a slight waist below, shoulders above."""
    t = z / body.lung_height
    wall = body.fat + body.muscle
    shoulders = smoothstep(0.7, 1.0, t)
    waist = 0.95 + 0.05 * smoothstep(-0.3, 0.2, t)
    half_x = (body.width + wall) * waist * (1.0 + 0.06 * shoulders)
    half_y = (body.depth + wall) * waist * (1.0 - 0.09 * shoulders)
    return half_x, half_y


def dome_height(body: Body, x: Any, y: Any) -> Any:
    """Height (mm) of the diaphragm above the lungs' lowest point: one dome for each side."""
    top = body.dome_left + (body.dome_right - body.dome_left) * (x < 0)
    q = ((np.abs(x) - 0.46 * body.width) / (0.62 * body.width)) ** 2 + ((y + 6.0) / (0.98 * body.depth)) ** 2
    return top * np.sqrt(np.maximum(1.0 - q, 0.0))


def heart_distance(body: Body, x: Any, y: Any, z: Any) -> Any:
    """The heart with its sac: an ellipsoid that lies to the left, its long axis towards the left front."""
    u, v = x - 20.0, y + 0.30 * body.depth
    along, across = 0.82 * u - 0.57 * v, 0.57 * u + 0.82 * v
    s = body.heart
    up = (z - 0.355 * body.lung_height) / (0.225 * body.lung_height)
    radius = np.sqrt((along / (56 * s)) ** 2 + (across / (41 * s)) ** 2 + up**2)
    return (radius - 1.0) * 42.0 * s


def mediastinum_half_width(body: Body, y: Any, z: Any) -> Any:
    """Half width (mm) of what separates the lungs: narrow in front, wide at the great vessels and beside the spine."""
    t = z / body.lung_height
    vessels = _weak(21.0 + 5.0 * np.exp(-(((t - 0.62) / 0.16) ** 2)))
    return (
        5.0
        + vessels * np.exp(-(((y + 0.10 * body.depth) / (0.50 * body.depth)) ** 2))
        + 16.0 * smoothstep(0.25, 0.55, y / body.depth)
    )


def lung_distance(body: Body, x: Any, y: Any, z: Any, chest: Any = None) -> Any:
    """Signed distance (mm, approximate) to the lungs, the patient's right one at x < 0 and the left one at x > 0.

    `chest` is the distance to the chest's inside, where the caller has it already.
    """
    if chest is None:
        chest = ellipse_distance(x, y, *cage_half_axes(body, z), CHEST_POWER)
    medial = mediastinum_half_width(body, y, z) - np.abs(x)
    below = 0.7 * (dome_height(body, x, y) - z)
    distance = np.maximum(np.maximum(chest + 3.0, medial), below)
    return np.maximum(distance, 2.5 - heart_distance(body, x, y, z))


def points_in_lung(body: Body, side: float, count: int, margin: float, random: np.random.Generator) -> Array:
    """`count` points (n, 3) as x, y, z, uniform in the lung of one side, at least about `margin` mm inside."""
    found = np.empty((0, 3))
    while len(found) < count:
        draw = random.uniform(size=(4 * count, 3))
        x = side * draw[:, 0] * body.width
        y = (2.0 * draw[:, 1] - 1.0) * body.depth
        z = draw[:, 2] * body.lung_height
        inside = lung_distance(body, x, y, z) < -margin
        found = np.concatenate([found, np.stack([x, y, z], axis=1)[inside]])
    return found[:count]
