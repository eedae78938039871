"""Stretches: the windows of a run that lie one behind the other in one volume, and the slices that they need.

A run is a piece of the order's list; where the list passes from one volume to the next, or round a series' end, it is
several stretches. Invariant: what a stretch is depends on the plan alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dinox_io.mixture import Mixture
from dinox_io.placement import Stretch, WindowSource
from dinox_io.plan import Plan
from dinox_io.window import WindowTable, inside

_FORGET_EVERY = 256


class StretchFinder:
    """Finds the stretch of each row of a plan. Not thread-safe; plans must come in their order."""

    def __init__(
        self,
        mixture: Mixture,
        tables: Sequence[WindowTable],
        sources: Sequence[WindowSource],
        *,
        depth: int,
        parts: int,
    ) -> None:
        self._mixture, self._tables, self._sources = mixture, tables, sources
        self._depth, self._parts = depth, parts
        self._known: dict[tuple[int, int, int, int], Stretch] = {}  # (set, pass, volume, centre) -> its stretch

    def __call__(self, plan: Plan, sequence: int) -> list[Stretch]:
        """The stretch of each row, in their order."""
        if sequence % _FORGET_EVERY == 0:
            # What other ranks draw, and what was drawn before we began, is never asked for.
            self._known = {key: one for key, one in self._known.items() if one.last_sequence >= sequence}
        keys = list(
            zip(plan.set.tolist(), plan.number.tolist(), plan.volume.tolist(), plan.center.tolist(), strict=True)
        )
        new = np.array([key not in self._known for key in keys])
        for set_number in np.unique(plan.set[new & (plan.run >= 0)]).tolist():
            for number in np.unique(plan.number[plan.set == set_number]).tolist():
                rows = new & (plan.run >= 0) & (plan.set == set_number) & (plan.number == number)
                runs, first = np.unique(plan.run[rows], return_index=True)
                self._learn(set_number, number, runs, plan.last_batch[rows][first])
        return [
            self._known.pop(key) if run >= 0 else self._alone(key, step, sequence)
            for key, run, step in zip(keys, plan.run.tolist(), plan.step.tolist(), strict=True)
        ]

    def _learn(self, set_number: int, number: int, runs: np.ndarray, last_batch: np.ndarray) -> None:
        windows = self._mixture.orders[set_number].windows_of_runs(number, runs)
        table = self._tables[set_number]
        volume, center, step = table.locate(np.maximum(windows, 0))
        every = table.every_of(np.maximum(windows, 0))
        for row, run in enumerate(runs.tolist()):
            own = windows[row] >= 0
            columns = (volume[row][own], center[row][own], step[row][own], every[row][own])
            apart = (np.diff(columns[0]) != 0) | (np.diff(columns[1]) != columns[3][1:])
            borders = [0, *(np.flatnonzero(apart) + 1).tolist(), int(own.sum())]
            for piece, (begin, end) in enumerate(pairwise(borders)):
                key = (set_number, number, run, piece)
                last = (int(last_batch[row]) + 1) * self._parts - 1
                stretch = self._stretch(
                    key, int(columns[0][begin]), columns[1][begin:end], int(columns[2][begin]), last
                )
                for one in columns[1][begin:end].tolist():
                    self._known[set_number, number, stretch.volume, one] = stretch

    def _alone(self, key: tuple[int, int, int, int], step: int, sequence: int) -> Stretch:
        set_number, number, volume, center = key
        own = (set_number, number, -1, volume, center)
        return self._stretch(own, volume, np.array([center]), step, sequence)

    def _stretch(self, key: tuple[int, ...], volume: int, centers: np.ndarray, step: int, last: int) -> Stretch:
        reach = self._depth // 2 * step
        first = int(centers[0]) - reach
        wanted = centers[:, None] + step * np.arange(-(self._depth // 2), self._depth // 2 + 1)
        source = self._sources[key[0]]
        slices = np.full(int(centers[-1]) + reach - first + 1, -1, np.int64)
        slices[(wanted - first).ravel()] = inside(wanted.ravel(), source.num_slices_of(volume), source.edge)
        return Stretch(
            key=key,
            set=key[0],
            volume=volume,
            first_slice=first,
            slices=slices,
            windows=len(centers),
            last_sequence=last,
        )


def longest_stretch(tables: Sequence[WindowTable], depth: int, run_length: int) -> int:
    """Slices of the longest stretch that there can be."""
    return max((run_length - 1) * int(table.every.max()) + (depth - 1) * int(table.step.max()) + 1 for table in tables)
