"""Where the windows of batches lie in memory: what must be decoded for a batch, into which place, and when it is free.

Two placements, by mode. `SlabPlacement`: each window is decoded into its own row of a slab. `RunPlacement`: the slices
of a run are decoded once into a slot of a pool, and the windows of several batches are views of it.

Invariant: memory is written only while no batch that lies in it is held or on its way; and what a batch holds does not
depend on the placement, nor on how large the pool is. All methods are called with the pipeline's lock held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dinox_io.decoder import ThreadDecoder
from dinox_io.hounsfield import AIR_HU
from dinox_io.plan import Plan
from dinox_io.window import inside


class WindowSource(Protocol):
    """What the threads and placements ask: a ShardSet."""

    edge: str

    def new_decoder(self) -> ThreadDecoder: ...
    def read_frames_into(
        self, volume: int, slices: np.ndarray, out: np.ndarray, decoder: ThreadDecoder, *, filtered: bool = False
    ) -> None: ...
    def size_of(self, volume: np.ndarray) -> np.ndarray: ...
    def spacing_of(self, volume: np.ndarray) -> np.ndarray: ...
    def filter_of(self, volume: np.ndarray) -> np.ndarray: ...
    def num_slices_of(self, volume: int) -> int: ...
    def place_of(self, volume: int) -> str: ...


@dataclass(eq=False)
class Job:
    """Slices of one volume that are decoded together: one read."""

    source: WindowSource
    volume: int
    slices: np.ndarray
    """int64 (s,); -1 where none is wanted."""
    out: np.ndarray
    """(s, y, x) int16, or (s, 2·y·x) uint8 of filtered bytes."""
    before: Callable[[], None] | None = None
    """Called by the thread that decodes, first."""
    begun: bool = False
    """Somebody decodes it, or it waits for somebody."""
    done: bool = False

    @property
    def text(self) -> str:
        """What it is, for messages."""
        wanted = self.slices[self.slices >= 0]
        return f"{self.source.place_of(self.volume)}: slices {wanted.min()} to {wanted.max()}"


@dataclass(eq=False)
class Placed:
    """A batch on its way, or held: what it waits for, and its windows."""

    sequence: int
    plan: Plan
    sizes: np.ndarray
    """int64 (b, 2)."""
    jobs: list[Job]
    windows: list[np.ndarray]
    """b views (depth, y, x) int16, or (depth, 2·y·x) uint8."""
    images: np.ndarray | None
    """int16 (b, depth, Y, X), where the placement decodes into one."""
    held: list[object] = field(default_factory=list)
    """What the placement gives back on release."""


class SlabPlacement:
    """A slab for each batch that is on its way, and one for the batch that is held."""

    def __init__(self, sources: Sequence[WindowSource], slabs: np.ndarray, *, filtered: bool) -> None:
        """slabs: int16 (n, rows, depth, Y, X), or uint8 (n, rows, depth, 2·Y·X)."""
        self._sources, self._filtered = sources, filtered
        if not filtered:
            slabs[...] = AIR_HU
        self._free = [_Slab(slab) for slab in slabs]

    def place(self, sequence: int, plan: Plan, sizes: np.ndarray) -> Placed | None:
        """The batch and its new jobs (all that are not done); None if there is no room now."""
        if not self._free:
            return None
        slab = self._free.pop()
        depth = slab.data.shape[1]
        reach = np.arange(-(depth // 2), depth // 2 + 1)
        jobs: list[Job] = []
        windows: list[np.ndarray] = []
        for row, (y, x) in enumerate(sizes.tolist()):
            source, volume = self._sources[int(plan.set[row])], int(plan.volume[row])
            center, step = int(plan.center[row]), int(plan.step[row])
            slices = inside(center + step * reach, source.num_slices_of(volume), source.edge)
            out = slab.data[row, :, : 2 * y * x] if self._filtered else slab.data[row, :, :y, :x]
            before = None if self._filtered else _air_around(slab, row, y, x)
            windows.append(out)
            jobs.append(Job(source=source, volume=volume, slices=slices, out=out, before=before))
        images = None if self._filtered else slab.data[: len(windows)]
        return Placed(sequence=sequence, plan=plan, sizes=sizes, jobs=jobs, windows=windows, images=images, held=[slab])

    def release(self, placed: Placed) -> None:
        """The batch is held no more."""
        for slab in placed.held:
            assert isinstance(slab, _Slab)
            self._free.append(slab)


class _Slab:
    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.written = np.zeros((len(data), 2), np.int64)  # y, x of what each row held last


def _air_around(slab: _Slab, row: int, y: int, x: int) -> Callable[[], None] | None:
    """Where a row held a larger slice before, there must be air again."""
    larger = (slab.written[row] > (y, x)).any()
    slab.written[row] = y, x
    if not larger:
        return None

    def clear() -> None:
        slab.data[row, :, y:] = AIR_HU
        slab.data[row, :, :y, x:] = AIR_HU

    return clear


@dataclass(eq=False)
class _Stretch:
    """Windows of a run that lie one behind the other in one volume, decoded into one slot."""

    key: tuple[int, ...]
    job: Job
    first_slice: int
    """The (virtual) slice that lies first in the slot: that of its first window, which may lie before the volume."""
    last_sequence: int
    left: int
    """Windows that have not been handed out yet."""
    slot: np.ndarray
    users: int = 0
    """Batches on their way or held."""


class RunPlacement:
    """A pool of slots, one for each stretch of a run; a stretch stays until its last window has been handed out.

    Where the pool is too small for all stretches that are alive, those whose last window is furthest away give way, and
    are decoded again: it costs time and changes nothing.
    """

    def __init__(
        self,
        sources: Sequence[WindowSource],
        pool: np.ndarray,
        depth: int,
        stretches_of: Callable[[Plan, int], Sequence[Stretch]],
        *,
        filtered: bool,
    ) -> None:
        """pool: int16 or uint8 (slots, values). stretches_of: the stretch that each row of a plan is of."""
        self._sources, self._depth, self._filtered = sources, depth, filtered
        self._stretches_of = stretches_of
        self._free = list(pool)
        self._alive: dict[tuple[int, ...], _Stretch] = {}
        self.again = 0
        """Stretches that had to give way before their last window."""

    def place(self, sequence: int, plan: Plan, sizes: np.ndarray) -> Placed | None:
        """The batch and its new jobs; None if there is no room now."""
        wanted = self._stretches_of(plan, sequence)
        new = {one.key for one in wanted} - self._alive.keys()
        if not self._make_room(len(new), {one.key for one in wanted}):
            return None
        windows: list[np.ndarray] = []
        used: dict[_Stretch, None] = {}  # a set that keeps its order
        for row, (one, (y, x)) in enumerate(zip(wanted, sizes.tolist(), strict=True)):
            stretch = self._alive.get(one.key)
            if stretch is None:
                stretch = self._alive[one.key] = self._begin(one, y, x)
            used[stretch] = None
            stretch.left -= 1
            step = int(plan.step[row])
            first = int(plan.center[row]) - self._depth // 2 * step - stretch.first_slice
            windows.append(stretch.job.out[first : first + (self._depth - 1) * step + 1 : step])
        for stretch in used:
            stretch.users += 1
        jobs = [stretch.job for stretch in used if not stretch.job.done]
        return Placed(
            sequence=sequence, plan=plan, sizes=sizes, jobs=jobs, windows=windows, images=None, held=list(used)
        )

    def release(self, placed: Placed) -> None:
        """The batch is held no more; stretches that nobody will ask for again are free."""
        for stretch in placed.held:
            assert isinstance(stretch, _Stretch)
            stretch.users -= 1
        # Those that no later batch can want: their last one was this or before.
        over = [one for one in self._alive.values() if one.users == 0 and self._is_over(one, placed.sequence)]
        for stretch in over:
            self._drop(stretch)

    @staticmethod
    def _is_over(stretch: _Stretch, sequence: int) -> bool:
        return stretch.left <= 0 or stretch.last_sequence <= sequence

    def _drop(self, stretch: _Stretch) -> None:
        del self._alive[stretch.key]
        self._free.append(stretch.slot)

    def _make_room(self, count: int, wanted: set[tuple[int, ...]]) -> bool:
        if len(self._free) < count:
            idle = [one for one in self._alive.values() if one.users == 0 and one.key not in wanted]
            if len(self._free) + len(idle) < count:
                return False
            idle.sort(key=lambda one: one.last_sequence, reverse=True)
            for stretch in idle[: count - len(self._free)]:
                self.again += 1
                self._drop(stretch)
        return True

    def _begin(self, one: Stretch, y: int, x: int) -> _Stretch:
        source = self._sources[one.set]
        slot = self._free.pop()
        length, size = len(one.slices), y * x
        out = slot[: length * size * (2 if self._filtered else 1)]
        out = out.reshape((length, 2 * size) if self._filtered else (length, y, x))
        job = Job(source=source, volume=one.volume, slices=one.slices, out=out)
        return _Stretch(
            key=one.key,
            job=job,
            first_slice=one.first_slice,
            last_sequence=one.last_sequence,
            left=one.windows,
            slot=slot,
        )


@dataclass(frozen=True)
class Stretch:
    """Windows of one run in one volume, one behind the other."""

    key: tuple[int, ...]
    set: int
    volume: int
    first_slice: int
    slices: np.ndarray
    """int64 (s,): true slices from `first_slice` on, the edge policy applied; -1 where none is wanted."""
    windows: int
    last_sequence: int
    """No batch after this one wants it."""
