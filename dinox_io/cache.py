"""Decoded slices that stay in memory from pass to pass, within a budget: for sets that fit, or nearly.

Invariant: what is read is bit for bit what the set would have given. Which volumes are kept is a function of the sets,
their weights and the budget, and never changes: an order that shows every window once a pass gives each slice the same
chance to be wanted next, so that replacing one by another can only cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dinox_io.decoder import ThreadDecoder
from dinox_io.memory import plain_memory, taken
from dinox_io.placement import WindowSource

_SLICE_BYTES = 2
"""Of a pixel; a filtered slice has as many bytes as its pixels have."""


class CacheableSource(WindowSource, Protocol):
    """A ShardSet."""

    @property
    def slice_size(self) -> tuple[int, int]: ...


class CachedSource:
    """A set of which some volumes are decoded once. May be read from many threads at once, into one kind of `out`."""

    def __init__(self, source: CacheableSource, volumes: Sequence[int], memory: np.ndarray) -> None:
        """volumes: those that are kept. memory: uint8, room for all their slices."""
        self._source, self.edge = source, source.edge
        self._slices: dict[int, np.ndarray] = {}
        self._present: dict[int, np.ndarray] = {}
        begin = 0
        for volume in volumes:
            count, size = source.num_slices_of(volume), _slice_bytes(source, volume)
            self._slices[volume] = memory[begin : begin + count * size].reshape(count, size)
            self._present[volume] = np.zeros(count, bool)
            begin += count * size

    @property
    def slice_size(self) -> tuple[int, int]:
        return self._source.slice_size

    def new_decoder(self) -> ThreadDecoder:
        return self._source.new_decoder()

    def size_of(self, volume: np.ndarray) -> np.ndarray:
        return self._source.size_of(volume)

    def spacing_of(self, volume: np.ndarray) -> np.ndarray:
        return self._source.spacing_of(volume)

    def filter_of(self, volume: np.ndarray) -> np.ndarray:
        return self._source.filter_of(volume)

    def num_slices_of(self, volume: int) -> int:
        return self._source.num_slices_of(volume)

    def place_of(self, volume: int) -> str:
        return self._source.place_of(volume)

    def read_frames_into(
        self, volume: int, slices: np.ndarray, out: np.ndarray, decoder: ThreadDecoder, *, filtered: bool = False
    ) -> None:
        """As ShardSet's; slices that are in memory are copied, the others read in one stretch and kept."""
        kept = self._slices.get(volume)
        if kept is None:
            self._source.read_frames_into(volume, slices, out, decoder, filtered=filtered)
            return
        present = self._present[volume]
        there = (slices >= 0) & present[slices]
        missing = np.where(there, -1, slices)
        if (missing >= 0).any():
            self._source.read_frames_into(volume, missing, out, decoder, filtered=filtered)
        for row, z in enumerate(slices.tolist()):
            if z < 0:
                continue
            slot = kept[z].view(out.dtype).reshape(out.shape[1:])
            if there[row]:
                out[row] = slot
                decoder.cached_bytes += slot.nbytes
            elif not present[z]:
                # Two threads may both write it: they write the same. It counts as present when it is whole.
                slot[...] = out[row]
                present[z] = True


def with_cache(
    sources: Sequence[CacheableSource],
    volumes: Sequence[np.ndarray],
    draws: Sequence[float],
    *,
    cache_bytes: int,
) -> list[CachedSource]:
    """Sources that keep as many whole volumes as `cache_bytes` holds, those first that are drawn most often.

    volumes: of each source, the numbers of those that are drawn from. draws: of each, how often one of its windows is
    drawn, relative to the others'. ValueError for a negative budget, MemoryError if so much is not free.
    """
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes is {cache_bytes}; it must not be negative")
    chosen: list[list[int]] = [[] for _ in sources]
    sizes = [0 for _ in sources]
    left = cache_bytes
    for number in sorted(range(len(sources)), key=lambda one: -draws[one]):
        source = sources[number]
        for volume in np.unique(volumes[number]).tolist():
            size = source.num_slices_of(volume) * _slice_bytes(source, volume)
            if size <= left:
                chosen[number].append(volume)
                sizes[number] += size
                left -= size
    memory = taken(sum(sizes), plain_memory)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    return [
        CachedSource(source, chosen[number], memory[starts[number] : starts[number + 1]])
        for number, source in enumerate(sources)
    ]


def _slice_bytes(source: CacheableSource, volume: int) -> int:
    return _SLICE_BYTES * int(source.size_of(np.array([volume])).prod())
