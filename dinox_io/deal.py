"""The deal of one pass: which window each taker (head, M batches, tail) gets in each round. See order.py for the why.

Invariant: every window of the pass lies in one place, and every place goes to one taker; both are evaluated where they
are asked for, in the same time for a thousand windows and for a billion.

Places are numbered round by round: place p of round r is r·E + p, E being the number of takers. A taker that leaves out
a round leaves its place empty; the list of windows passes over it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dinox_io.cuts import Cuts
from dinox_io.permutation import mixed, permuted
from dinox_io.philox import philox_bits, shuffled

# Streams of random bits of one pass.
_SERIES, _WINDOWS, _PHASES, _CLASSES, _PLACES, _LAST = range(6)

RUNS_OF_ZONE = 2
"""Runs that a zone of one class takes in a round; with two classes 2 · RUNS_OF_ZONE batches of runs are alive."""


class Layout(NamedTuple):
    """Of one pass: number of its first whole batch, how many there are, windows in its head and its tail."""

    first: int
    batches: int
    head: int
    tail: int


class Dealt(NamedTuple):
    """What takers get in rounds, int64 arrays of one shape."""

    place: np.ndarray
    """-1 where a taker has none."""
    run: np.ndarray
    """The first place of the run that the place is of; -1 where it is of none."""
    last_batch: np.ndarray
    """No window of that run is dealt to a later batch."""


class Deal:
    """One pass of n >= 2c windows. Takers are numbered in time: 0 the head, 1 … M the batches, M + 1 the tail."""

    def __init__(
        self, sizes: np.ndarray, cuts: Cuts, layout: Layout, *, seed: int, number: int, run_length: int = 1
    ) -> None:
        """sizes: windows of each series, int64 (s,). number: of the pass."""
        self.layout, self._cuts, self._rounds = layout, cuts, cuts.longest
        self.takers = layout.batches + 2
        self._class_sizes = ((self.takers + 1) // 2, self.takers // 2)
        self._run_length = run_length
        self._series_first = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        self._sizes = sizes
        self._series = shuffled(philox_bits(seed, number, _SERIES, len(sizes)))
        self._ends = np.cumsum(sizes[self._series])
        keys = philox_bits(seed, number, _WINDOWS, 4)
        self._window_key, self._class_key, self._place_key, self._last_key = keys
        self.head_rounds, self.tail_rounds = self._rounds_of_ends(philox_bits(seed, number, _PHASES, 2))
        self._last = None if cuts.even else self._last_round()
        self._empty = np.sort(np.concatenate([self._empty_places(0), self._empty_places(self.takers - 1)]))

    def _rounds_of_ends(self, bits: np.ndarray) -> list[np.ndarray]:
        """bool (c,) of head and tail: in which rounds they take a window, evenly spread from a random phase."""
        steps = np.arange(self._rounds + 1, dtype=np.int64)
        phases = (bits % np.uint64(self._rounds)).astype(np.int64)
        return [
            np.diff((steps * count + phase) // self._rounds).astype(bool)
            for count, phase in zip((self.layout.head, self.layout.tail), phases, strict=True)
        ]

    def _empty_places(self, taker: int) -> np.ndarray:
        taking = (self.head_rounds if taker == 0 else self.tail_rounds).copy()
        if self._last is not None:
            taking[-1] = True  # the last round has no empty places then: it is laid out
        return self.places(np.array([taker]), np.flatnonzero(~taking))

    # --- takers to places --------------------------------------------------------------------------------------

    def in_last(self, taker: np.ndarray) -> np.ndarray:
        """bool (…): whether takers take a window in the last round."""
        whole = self._cuts.lengths(self.layout.first - 1 + taker) == self._rounds
        whole = np.where(taker == 0, self.head_rounds[-1], whole)
        return np.where(taker == self.takers - 1, self.tail_rounds[-1], whole)

    def _is_b(self, taker: np.ndarray) -> np.ndarray:
        """bool (…): class of each taker: one of each two that follow each other is B, the last is A if it is alone."""
        odd = (taker & 1).astype(bool)
        coin = (mixed(self._class_key + (taker >> 1).astype(np.uint64)) & np.uint64(1)).astype(bool)
        is_b = odd ^ coin
        alone = taker == self.takers - 1 if self.takers % 2 else np.zeros(taker.shape, bool)
        if not self._cuts.even:
            own, other = self.in_last(taker), self.in_last(np.where(alone, taker, taker ^ 1))
            is_b = np.where(own != other, other, is_b)
        return is_b & ~alone

    def places(self, taker: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        """int64: places of takers in rounds (broadcast); -1 where one has none in a last round that is laid out."""
        return self.dealt(taker, rounds).place

    def dealt(self, taker: np.ndarray, rounds: np.ndarray) -> Dealt:
        """Places of takers in rounds (broadcast), and their runs."""
        taker, rounds = np.broadcast_arrays(taker, rounds)
        is_b = self._is_b(taker)
        size = np.where(is_b, self._class_sizes[1], self._class_sizes[0])
        key = self._place_key + (2 * rounds + is_b).astype(np.uint64)
        found = self._in_class(taker >> 1, size, rounds, key)
        begin = rounds * self.takers + np.where(is_b, self._class_sizes[0], 0)
        place, run = begin + found.place, np.where(found.run < 0, -1, begin + found.run)
        if self._last is not None:
            last, is_last = self._last[taker], rounds == self._rounds - 1
            place = np.where(is_last, np.where(last < 0, -1, rounds * self.takers + last), place)
            run = np.where(is_last, -1, run)
        return Dealt(place=place, run=run, last_batch=found.last_batch)

    def _in_class(self, pair: np.ndarray, size: np.ndarray, rounds: np.ndarray, key: np.ndarray) -> Dealt:
        """Places, from 0, of the members of a class (by their number in time): zone by zone if there are runs."""
        if self._run_length == 1:
            none = np.full(pair.shape, -1, np.int64)
            return Dealt(place=permuted(pair, size, key), run=none, last_batch=none)
        zone, length = self._zones(pair, size, rounds), self._run_length
        local = permuted(pair - zone.start, zone.stop - zone.start, key + (zone.number << 20).astype(np.uint64))
        inner = permuted(
            np.where(zone.is_inner, RUNS_OF_ZONE * (zone.number - 1) + local // length, 0),
            np.maximum(RUNS_OF_ZONE * (zone.zones - 2), 1),
            key,
        )
        run = np.where(zone.is_inner, zone.inner_start + inner * length, zone.start + local // length * length)
        last_taker = np.minimum(2 * zone.stop - 1, self.takers - 1)
        return Dealt(place=run + local % length, run=run, last_batch=self.layout.first - 1 + last_taker)

    def _zones(self, pair: np.ndarray, size: np.ndarray, rounds: np.ndarray) -> _Zone:
        length = RUNS_OF_ZONE * self._run_length
        shift = rounds * length // self._rounds
        number = (pair + shift) // length
        start = np.maximum(number * length - shift, 0)
        return _Zone(
            number=number,
            start=start,
            stop=np.minimum((number + 1) * length - shift, size),
            zones=(size - 1 + shift) // length + 1,
            inner_start=length - shift,
        )

    def _last_round(self) -> np.ndarray:
        """int64 (E,): the place of each taker in the last round, where batches differ in length; -1: it has none.

        All of class A come first, so that nobody who took at the end of the round before takes at its beginning.
        """
        takers = np.arange(self.takers)
        present = np.flatnonzero(self.in_last(takers))
        order = permuted(np.arange(len(present)), max(len(present), 1), self._last_key)
        present = present[np.argsort(order)]
        present = present[np.argsort(self._is_b(present), kind="stable")]
        places = np.full(self.takers, -1, np.int64)
        places[present] = np.arange(len(present))
        return places

    # --- places to windows -------------------------------------------------------------------------------------

    def windows(self, places: np.ndarray) -> np.ndarray:
        """int64 (…): the windows that lie in these places; -1 stays -1."""
        listed = places - np.searchsorted(self._empty, places)
        row = np.minimum(np.searchsorted(self._ends, listed, side="right"), len(self._series) - 1)
        series = self._series[row]
        size = np.maximum(self._sizes[series], 1)
        offset = np.clip(listed - (self._ends[row] - self._sizes[series]), 0, size - 1)
        key = self._window_key + series.astype(np.uint64)
        if self._run_length == 1:
            inside = permuted(offset, size, key)
        else:
            inside = (offset + (mixed(key) >> np.uint64(2)).astype(np.int64)) % size
        return np.where(places < 0, -1, self._series_first[series] + inside)

    def windows_of_runs(self, run: np.ndarray) -> np.ndarray:
        """int64 (m, run_length): the windows of runs (m,), in the order of the list; -1 where one has fewer."""
        rounds, inside = run // self.takers, run % self.takers
        is_b = inside >= self._class_sizes[0]
        first = inside - np.where(is_b, self._class_sizes[0], 0)
        size = np.where(is_b, self._class_sizes[1], self._class_sizes[0])
        zone = self._zones(first, size, rounds)
        # Runs of the first and the last zone end with it; the others have their whole length.
        stop = np.where(zone.is_inner, size, zone.stop)
        places = run[:, None] + np.arange(self._run_length)
        places = np.where(places - run[:, None] < (stop - first)[:, None], places, -1)
        return self.windows(np.where(np.isin(places, self._empty), -1, places))


class _Zone(NamedTuple):
    """Zones of a class in a round, by their members' numbers in time; arrays that broadcast against each other."""

    number: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    zones: np.ndarray
    inner_start: np.ndarray
    """Where the second zone starts: the first and the last one may be cut and keep to their own places."""

    @property
    def is_inner(self) -> np.ndarray:
        return (self.number > 0) & (self.number < self.zones - 1)
