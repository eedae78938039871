"""Vessels of the lungs: trees that grow into the space by colonisation, with radii that follow from what they feed.

Growth is space colonisation (Runions et al. 2007, "Modeling Trees with a Space Colonization Algorithm"): points in the
lung pull the nearest end of the tree; radii follow Murray's law with an exponent a little under its 3.
Invariant: every segment begins where its parent ends, so a vessel is continuous through the slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phantom.body import LUNG_SIDES, Body, points_in_lung

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
MURRAY_EXPONENT = 2.6
STEP_MM = 6.0
LEAF_RADIUS_MM = 0.7
REACHED_MM = 4.5


@dataclass(frozen=True)
class Segments:
    """Straight tubes: start and end (n, 3) as x, y, z, radius (n,), all mm."""

    start: Array
    end: Array
    radius: Array

    def crossing(self, z_mm: float, margin_mm: float) -> Segments:
        """Those within `margin_mm` of the plane at z."""
        low = np.minimum(self.start[:, 2], self.end[:, 2]) - self.radius - margin_mm
        high = np.maximum(self.start[:, 2], self.end[:, 2]) + self.radius + margin_mm
        keep = (low <= z_mm) & (high >= z_mm)
        return Segments(self.start[keep], self.end[keep], self.radius[keep])


def join(parts: list[Segments]) -> Segments:
    """One list out of several."""
    return Segments(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.end for part in parts]),
        np.concatenate([part.radius for part in parts]),
    )


def _grow(root: Array, targets: Array, random: np.random.Generator) -> tuple[Array, np.ndarray[Any, Any]]:
    """Nodes (n, 3) and the index of each node's parent (the root's is -1), parents before their children."""
    nodes, parents = root[None, :], np.array([-1])
    nearest = np.zeros(len(targets), np.int64)
    distance = np.linalg.norm(targets - root, axis=1)
    for _ in range(90):
        alive = distance > REACHED_MM
        targets, nearest, distance = targets[alive], nearest[alive], distance[alive]
        if not len(targets):
            break
        pull = np.zeros((len(nodes), 3))
        np.add.at(pull, nearest, (targets - nodes[nearest]) / distance[:, None])
        tips = np.unique(nearest)
        # Without the jitter two targets that pull in opposite directions would hold a tip in its place for ever.
        direction = pull[tips] + 0.25 * random.standard_normal((len(tips), 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        fresh = nodes[tips] + STEP_MM * direction
        gap = np.linalg.norm(targets[:, None, :] - fresh[None, :, :], axis=2)
        best = gap.argmin(axis=1)
        closest = gap[np.arange(len(targets)), best]
        closer = closest < distance
        nearest = np.where(closer, len(nodes) + best, nearest)
        distance = np.where(closer, closest, distance)
        nodes, parents = np.concatenate([nodes, fresh]), np.concatenate([parents, tips])
    return nodes, parents


def _radii(parents: np.ndarray[Any, Any], largest: float) -> Array:
    """Radius (mm) of the tube that ends at each node: the cubes (nearly) of the children's add up (Murray's law)."""
    power = np.zeros(len(parents))
    for node in range(len(parents) - 1, 0, -1):
        if power[node] == 0.0:
            power[node] = LEAF_RADIUS_MM**MURRAY_EXPONENT
        power[parents[node]] += power[node]
    return np.minimum(power ** (1.0 / MURRAY_EXPONENT), largest)


def _tree(body: Body, side: float, root: Array, count: int, largest: float, random: np.random.Generator) -> Segments:
    targets = points_in_lung(body, side, count, 4.0, random)
    nodes, parents = _grow(root, targets, random)
    radius = _radii(parents, largest)
    return Segments(nodes[parents[1:]], nodes[1:], radius[1:])


def hilum(body: Body, side: float) -> Array:
    """Where the artery enters the lung of one side (x, y, z in mm)."""
    return np.array([side * 34.0, 0.02 * body.depth, (0.53 if side < 0 else 0.56) * body.lung_height])


def venous_hilum(body: Body, side: float) -> Array:
    """Where the veins leave it."""
    return hilum(body, side) + np.array([0.0, -8.0, -28.0])


def pulmonary_vessels(body: Body, random: np.random.Generator) -> tuple[Segments, Segments]:
    """Arteries and veins of both lungs."""
    arteries, veins = [], []
    for side in LUNG_SIDES:
        arteries.append(_tree(body, side, hilum(body, side), 900, 7.0, random))
        veins.append(_tree(body, side, venous_hilum(body, side), 450, 6.0, random))
    return join(arteries), join(veins)


def bronchi(arteries: Segments) -> Segments:
    """The airways that run beside the larger arteries: inner radius, a little behind and above them."""
    keep = (arteries.radius > 1.7) & (arteries.radius < 6.5)
    radius = 0.75 * arteries.radius[keep]
    # One fixed direction keeps neighbouring tubes joined, since radii change slowly along a branch.
    offset = 1.6 * arteries.radius[keep][:, None] * np.array([0.35, 0.75, 0.55])
    return Segments(arteries.start[keep] + offset, arteries.end[keep] + offset, radius)
