"""The batch: windows of volumes in one slab of memory, and where each comes from.

Invariant: `images[i, :, :sizes[i, 0], :sizes[i, 1]]` is window i, and all else of `images` is air. A batch is valid
until the next one is asked for: its memory is then written anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """b windows of `depth` slices each."""

    images: np.ndarray
    """int16 HU (b, depth, Y, X); -1024 beyond a slice's true size."""
    sizes: np.ndarray
    """int32 (b, 2): true y, x."""
    volume: np.ndarray
    """int64 (b,): index into shards.volumes."""
    center: np.ndarray
    """int64 (b,): z of the middle slice."""
    epoch: np.ndarray
    """int64 (b,): epoch of each window; a batch may span two."""
    rows: np.ndarray
    """int64 (b,): which rows of the global batch these are."""
    spacing_mm: np.ndarray
    """float64 (b, 3): z, y, x."""
    position: int
    """Number of the global batch."""
    part: int
    """Which of its parts this is, from 0."""

    @property
    def windows(self) -> list[np.ndarray]:
        """b views int16 (depth, y, x) of true size; no copy."""
        return [image[:, :y, :x] for image, (y, x) in zip(self.images, self.sizes.tolist(), strict=True)]

    def __len__(self) -> int:
        return len(self.images)
