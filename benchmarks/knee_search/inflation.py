"""Virtual inflation: a small set that behaves like a large one, because its volumes stand in it many times.

Each copy counts as other volumes, so that passes are long, runs are dealt as in a large set, and an epoch does not end
every few batches. The copies are the same files (what is read is then in the page cache: "cached"), or distinct ones on
the disk (docs/knee.md: `--cold`).

Invariant: a window of a copy holds the bits of the window that it is a copy of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import dinox_train.data
from dinox_io import ShardSet, VolumeRecord, open_shards
from dinox_io.decoder import ThreadDecoder
from dinox_io.window import WindowTable


class InflatedSet:
    """`factor` times the volumes of a set; what the loader and a run ask of a ShardSet."""

    def __init__(self, parts: Sequence[ShardSet], factor: int) -> None:
        """parts: the set, and distinct copies of it where there are; they take turns. ValueError for no factor."""
        if factor < 1 or not parts:
            raise ValueError("an inflated set holds its volumes at least once")
        self._parts, self._base, self._count = parts, parts[0], len(parts[0].volumes)
        self.volumes: list[VolumeRecord] = [
            replace(
                volume,
                index=copy * self._count + volume.index,
                id=f"{volume.id}-{copy}",
                series=f"{volume.series}-{copy}",
            )
            for copy in range(factor)
            for volume in self._base.volumes
        ]
        self._sides = np.array([volume.split for volume in self.volumes])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)  # manifest, digest, edge, slice_size, new_decoder, windows …

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def volumes_of(self, split: str | None) -> np.ndarray:
        """int64: as ShardSet's."""
        self._base.volumes_of(split)  # says what is wrong with a side that is none
        return np.arange(len(self.volumes)) if split is None else np.flatnonzero(self._sides == split)

    def window_table(self, volumes: np.ndarray, *given: Any, **named: Any) -> WindowTable:
        """As ShardSet's."""
        return replace(self._base.window_table(volumes % self._count, *given, **named), volume=volumes)

    def read_frames_into(
        self, volume: int, slices: np.ndarray, out: np.ndarray, decoder: ThreadDecoder, *, filtered: bool = False
    ) -> None:
        copy, number = divmod(volume, self._count)
        part = self._parts[copy % len(self._parts)]
        part.read_frames_into(number, slices, out, decoder, filtered=filtered)

    def num_slices_of(self, volume: int) -> int:
        return self._base.num_slices_of(volume % self._count)

    def size_of(self, volume: np.ndarray) -> np.ndarray:
        return self._base.size_of(volume % self._count)

    def spacing_of(self, volume: np.ndarray) -> np.ndarray:
        return self._base.spacing_of(volume % self._count)

    def filter_of(self, volume: np.ndarray) -> np.ndarray:
        return self._base.filter_of(volume % self._count)

    def place_of(self, volume: int) -> str:
        return self._base.place_of(volume % self._count)


def inflate_sets(factor: int, copies: Sequence[str]) -> None:
    """From now on a run in this process opens inflated sets. copies: folders of distinct copies of its one set."""

    def inflated(
        path: str | Path, edge: str = "clamp", verify: str = "first", *, share: tuple[int, int] = (0, 1)
    ) -> Any:
        parts = [open_shards(one, edge=edge, verify=verify, share=share) for one in (path, *copies)]
        return InflatedSet(parts, factor)

    dinox_train.data.open_shards = inflated
