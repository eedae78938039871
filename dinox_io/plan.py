"""The plan of a batch before it is decoded: which windows of which sets, row by row, for one part and one rank.

Invariant: a plan is a pure function of its sequence number. What all ranks get in all parts of a position is, put
together, the global batch that `Mixture` gives, whatever the number of parts and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dinox_io.mixture import Mixture
from dinox_io.window import WindowTable


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One batch, or part of one; int64 (b,) each, as in Batch.

    step: how far apart the slices of a window are. number, run, last_batch: as in mixture.Draws.
    """

    set: np.ndarray
    volume: np.ndarray
    center: np.ndarray
    step: np.ndarray
    epoch: np.ndarray
    number: np.ndarray
    run: np.ndarray
    last_batch: np.ndarray
    rows: np.ndarray
    position: int
    part: int


class Planner:
    """Sequence number -> plan: part after part of position after position. Not thread-safe."""

    def __init__(
        self, mixture: Mixture, tables: Sequence[WindowTable], *, parts: int, rank: int = 0, world: int = 1
    ) -> None:
        """tables: the windows of each set of the mixture. ValueError if parts times world does not divide the batch."""
        if parts < 1 or world < 1 or mixture.batch_size % (parts * world):
            raise ValueError(
                f"parts is {parts} and world {world}; their product must divide batch_size, which is "
                f"{mixture.batch_size}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; it must be at least 0 and below world, which is {world}")
        self._mixture, self._tables = mixture, tables
        self._parts, self._rank = parts, rank
        self.rows = mixture.batch_size // (parts * world)
        """Rows of each plan."""

    def __call__(self, sequence: int) -> Plan:
        position, part = divmod(sequence, self._parts)
        part_rows = self._mixture.batch_size // self._parts
        rows = part * part_rows + self._rank * self.rows + np.arange(self.rows)
        draws = self._mixture.batch(position)
        sets, windows = draws.set[rows], draws.window[rows]
        located = np.empty((3, self.rows), np.int64)
        for number, table in enumerate(self._tables):
            own = sets == number
            located[:, own] = table.locate(windows[own])
        volume, center, step = located
        return Plan(
            set=sets,
            volume=volume,
            center=center,
            step=step,
            epoch=draws.epoch[rows],
            number=draws.number[rows],
            run=draws.run[rows],
            last_batch=draws.last_batch[rows],
            rows=rows,
            position=position,
            part=part,
        )


def in_order(table: WindowTable, batch_size: int) -> Callable[[int], Plan | None]:
    """The plan of all windows of a table, once and in order, the last batch short; None behind it."""

    def plan(number: int) -> Plan | None:
        windows = np.arange(number * batch_size, min((number + 1) * batch_size, table.num_windows))
        if not len(windows):
            return None
        volume, center, step = table.locate(windows)
        none = np.zeros(len(windows), np.int64)
        return Plan(
            set=none,
            volume=volume,
            center=center,
            step=step,
            epoch=none,
            number=none,
            run=none - 1,
            last_batch=none - 1,
            rows=np.arange(len(windows)),
            position=number,
            part=0,
        )

    return plan
