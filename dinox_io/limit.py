"""A few windows of many: which ones `limit` leaves to draw from, as a pure function of the seed.

Invariant: each window that is left is one of the set's, with its own centre, step and neighbours; a larger limit leaves
all that a smaller one does, and a limit of all windows or more leaves the table as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dinox_io.permutation import mixed, permuted
from dinox_io.window import WindowTable

_PURPOSE = 0x6C696D6974  # "limit": the order's own permutations have other keys


def limited(table: WindowTable, limit: int, seed: int) -> WindowTable:
    """The `limit` windows of a table that `seed` (below 2**64) chooses, in the table's order; volumes without any are
    left out.

    ValueError for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if limit >= table.num_windows:
        return table
    key = mixed(np.array([seed], np.uint64) ^ np.uint64(_PURPOSE))[0]
    window = np.sort(permuted(np.arange(limit), table.num_windows, key))
    ends = np.cumsum(table.centers)
    row = np.searchsorted(ends, window, side="right")
    inside = window - (ends - table.centers)[row]
    if table.chosen is not None:
        inside = table.chosen[window]
    kept, centers = np.unique(row, return_counts=True)
    return replace(
        table,
        volume=table.volume[kept],
        centers=centers.astype(np.int64),
        first_center=table.first_center[kept],
        every=table.every[kept],
        step=table.step[kept],
        chosen=inside,
    )


def shared(limit: int, weights: Sequence[float]) -> list[int]:
    """How many of `limit` windows come from each set, by weight, at least one from each; together `limit` where that
    is no fewer than there are sets."""
    borders = np.rint(limit * np.cumsum([0.0, *weights]) / sum(weights)).astype(np.int64)
    return np.maximum(np.diff(borders), 1).tolist()
