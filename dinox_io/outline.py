"""The pixels that a closed outline encloses.

Invariant: all arithmetic is on whole numbers, so a pixel is inside, outside or on the outline exactly, on any machine.
"""

from __future__ import annotations

import numpy as np

MAX_POINTS = 100_000


def enclosed(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels strictly inside a polygon, by the even-odd rule; what lies on its outline is not inside.

    Args:
        points: (n, 2) integers, row and column of each corner in order; the last is joined to the first. Pixels are
            their centres.
        shape: (rows, columns) of the result.

    Returns:
        bool (rows, columns).

    Raises:
        ValueError: no points, too many, or one of them outside `shape`.
    """
    points = np.asarray(points, np.int64)
    rows, columns = shape
    if points.ndim != 2 or points.shape[1] != 2 or not 0 < len(points) <= MAX_POINTS:
        raise ValueError(f"an outline has 1 to {MAX_POINTS} corners of a row and a column each, not {points.shape}")
    if (points < 0).any() or (points >= (rows, columns)).any():
        raise ValueError(f"an outline leaves the matrix of {rows} x {columns}")
    y, x, y_next, x_next = *points.T, *np.roll(points, -1, axis=0).T
    turned = y_next < y  # each edge is walked downwards, so that both ways give the same crossings
    y, y_next = np.where(turned, y_next, y), np.where(turned, y, y_next)
    x, x_next = np.where(turned, x_next, x), np.where(turned, x, x_next)
    height, width = y_next - y, x_next - x

    # One entry for each row that an edge meets, its lower end included.
    edge = np.repeat(np.arange(len(y)), height + 1)
    down = np.arange(len(edge)) - np.repeat(np.cumsum(height + 1) - height - 1, height + 1)
    row, run = y[edge] + down, np.maximum(height[edge], 1)
    across, rest = np.divmod(down * width[edge], run)
    column = x[edge] + across + (rest > 0)  # first pixel at or right of the crossing

    # A row is crossed where an edge comes from above or begins, not where it ends: corners count once.
    crossing = down < height[edge]
    toggles = np.zeros((rows, columns + 1), np.int64)
    np.add.at(toggles, (row[crossing], column[crossing]), 1)
    inside = np.cumsum(toggles, axis=1)[:, :columns] % 2 == 1

    touching = (rest == 0) & (height[edge] > 0)
    inside[row[touching], column[touching]] = False
    for flat in np.flatnonzero(height == 0):
        left, right = sorted((int(x[flat]), int(x_next[flat])))
        inside[y[flat], left : right + 1] = False
    return inside
