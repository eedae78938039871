"""The batch: windows of volumes, and where each comes from.

Invariant: `images[i, :, :sizes[i, 0], :sizes[i, 1]]` is window i, and all else of `images` is air. A batch is valid
until the next one is asked for: its memory is then written anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dinox_io.hounsfield import AIR_HU
from dinox_io.memory import Allocate, plain_memory


class Room:
    """Memory in which windows are copied together; the same for every batch of a loader, as fresh pages cost more."""

    def __init__(self, slice_size: tuple[int, int], allocate: Allocate = plain_memory) -> None:
        """slice_size: the largest y and the largest x."""
        self.slice_size, self._allocate = slice_size, allocate
        self._images = np.empty(0, np.int16)
        self.copied_bytes = 0

    def assemble(self, windows: list[np.ndarray]) -> np.ndarray:
        """b windows int16 (depth, y, x) -> int16 (b, depth, Y, X)."""
        shape = (len(windows), len(windows[0]), *self.slice_size)
        if self._images.size < np.prod(shape):
            self._images = self._allocate(2 * int(np.prod(shape))).view(np.int16)
        images = self._images[: int(np.prod(shape))].reshape(shape)
        for image, window in zip(images, windows, strict=True):
            _, y, x = window.shape
            image[:, :y, :x] = window
            image[:, y:] = AIR_HU
            image[:, :y, x:] = AIR_HU
            self.copied_bytes += window.nbytes
        return images


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """b windows of `depth` slices each."""

    windows: list[np.ndarray]
    """b views int16 HU (depth, y, x) of true size, without a copy; of a loader with filtered=True uint8 (depth, 2·y·x),
    what the filter made of them (docs/format.md)."""
    filtered: bool
    filters: np.ndarray
    """uint8 (b,): the filter of each window's volume, as its place in `filters.FILTERS`: 0 none, 1 planes, 2 hilp."""
    assembled: np.ndarray | None
    """`images`, where the mode decodes into one."""
    room: Room
    """Where they are assembled otherwise."""
    sizes: np.ndarray
    """int32 (b, 2): true y, x."""
    set: np.ndarray
    """int64 (b,): which of the loader's sets; 0 where there is one."""
    volume: np.ndarray
    """int64 (b,): index into the volumes of that set."""
    center: np.ndarray
    """int64 (b,): z of the middle slice."""
    epoch: np.ndarray
    """int64 (b,): epoch of each window in its set; a batch may span two."""
    rows: np.ndarray
    """int64 (b,): which rows of the global batch these are."""
    spacing_mm: np.ndarray
    """float64 (b, 3): z, y, x."""
    position: int
    """Number of the global batch."""
    part: int
    """Which of its parts this is, from 0."""

    @cached_property
    def images(self) -> np.ndarray:
        """int16 HU (b, depth, Y, X); -1024 beyond a slice's true size. The windows copied together, unless they lie so.

        ValueError for filtered windows: they have no pixels yet.
        """
        if self.filtered:
            raise ValueError("windows that are still filtered make no images: take batch.windows, or filtered=False")
        if self.assembled is not None:
            return self.assembled
        return self.room.assemble(self.windows)

    @property
    def slice_size(self) -> tuple[int, int]:
        """Y, X of `images`: the largest of the sets."""
        return self.room.slice_size

    def __len__(self) -> int:
        return len(self.windows)
