"""Masks as run lengths: exact, compact, and bounded before anything is allocated.

Invariant: a mask has one spelling. Runs are the lengths of alternating stretches of a bool array in C order, the first
of zeros (0 where the array begins with a one), all others at least 1; their sum is the number of its voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_VOXELS = 1 << 28


def encode_mask(mask: np.ndarray) -> tuple[int, ...]:
    """Runs of a bool array of any shape, such as (z, y, x). ValueError for an empty array."""
    flat = np.asarray(mask, bool).ravel()
    if not flat.size:
        raise ValueError("a mask needs at least one voxel")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], borders, [flat.size]])).tolist()
    return (0, *lengths) if flat[0] else tuple(lengths)


def decode_mask(runs: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The bool array of `shape` that `encode_mask` made `runs` of.

    ValueError, before it is allocated, if the shape is none, has more than 2**28 voxels, or is not that of the runs.
    """
    check_runs(runs, shape)
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, np.array(runs, np.int64)).reshape(tuple(shape))


def check_runs(runs: Sequence[int], shape: Sequence[int]) -> None:
    """ValueError unless these are the runs of a mask of this shape."""
    voxels = 1
    for size in shape:
        if type(size) is not int or size < 1:
            raise ValueError(f"{list(shape)} is not the shape of a mask")
        voxels *= size
        if voxels > MAX_VOXELS:
            raise ValueError(f"a mask of shape {list(shape)} has more than {MAX_VOXELS} voxels")
    if not all(type(run) is int and run >= (number > 0) for number, run in enumerate(runs)):
        raise ValueError("runs are whole numbers, the first at least 0, the others at least 1")
    if sum(runs) != voxels:
        raise ValueError(f"the runs add up to {sum(runs)} voxels, a mask of shape {list(shape)} has {voxels}")
