"""Pipelines over the memory that they are given: which placement, how many slabs or slots, how far ahead.

Invariant: memory is counted and compared with what is free before any is taken, and taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dinox_io.memory import Allocate, plain_memory, taken
from dinox_io.mixture import Mixture
from dinox_io.pace import Pace
from dinox_io.pipeline import Pipeline
from dinox_io.placement import RunPlacement, SlabPlacement, WindowSource
from dinox_io.plan import Plan, Planner
from dinox_io.stretches import StretchFinder, longest_stretch
from dinox_io.window import WindowTable

MAX_AHEAD = 8


class Source(WindowSource, Protocol):
    """A ShardSet."""

    @property
    def slice_size(self) -> tuple[int, int]: ...


def slab_pipeline(
    sources: Sequence[Source],
    plan: Callable[[int], Plan | None],
    *,
    rows: int,
    depth: int,
    prefetch_bytes: int,
    pace: Pace,
    timeout_s: float,
    first: int = 0,
    filtered: bool = False,
    allocate: Allocate = plain_memory,
) -> Pipeline:
    """Each window is decoded into its own row. ValueError, MemoryError."""
    edges = _slice_size(sources)
    slab_bytes = 2 * rows * depth * edges[0] * edges[1]
    ahead = _ahead(prefetch_bytes, slab_bytes)
    shape = (rows, depth, 2 * edges[0] * edges[1]) if filtered else (rows, depth, *edges)
    memory = taken((ahead + 1) * slab_bytes, allocate).view(np.uint8 if filtered else np.int16)
    return Pipeline(
        sources,
        plan,
        SlabPlacement(sources, memory.reshape(ahead + 1, *shape), filtered=filtered),
        first=first,
        ahead=ahead,
        slice_size=edges,
        pace=pace,
        timeout_s=timeout_s,
        filtered=filtered,
        allocate=allocate,
    )


def run_pipeline(
    sources: Sequence[Source],
    planner: Planner,
    mixture: Mixture,
    tables: Sequence[WindowTable],
    *,
    depth: int,
    parts: int,
    run_length: int,
    prefetch_bytes: int,
    pool_bytes: int,
    pace: Pace,
    timeout_s: float,
    first: int = 0,
    filtered: bool = False,
    allocate: Allocate = plain_memory,
) -> tuple[Pipeline, RunPlacement]:
    """The slices of a run are decoded once into a slot of a pool of at most `pool_bytes`. ValueError, MemoryError."""
    edges = _slice_size(sources)
    slot_bytes = 2 * longest_stretch(tables, depth, run_length) * edges[0] * edges[1]
    slots = min(pool_bytes // slot_bytes, most_slots(planner, run_length))
    if slots < planner.rows:
        raise ValueError(
            f"pool_bytes is {pool_bytes}, room for {slots} runs of {slot_bytes} bytes, where a batch of {planner.rows} "
            "windows may need as many: raise it, or choose a smaller run_length or mode random"
        )
    memory = taken(slots * slot_bytes, allocate).view(np.uint8 if filtered else np.int16)
    placement = RunPlacement(
        sources,
        memory.reshape(slots, -1),
        depth,
        StretchFinder(mixture, tables, sources, depth=depth, parts=parts),
        filtered=filtered,
    )
    pipeline = Pipeline(
        sources,
        planner,
        placement,
        first=first,
        ahead=_ahead(prefetch_bytes, 2 * planner.rows * depth * edges[0] * edges[1]),
        slice_size=edges,
        pace=pace,
        timeout_s=timeout_s,
        filtered=filtered,
        allocate=allocate,
    )
    return pipeline, placement


def most_slots(planner: Planner, run_length: int) -> int:
    """Slots that are enough for all runs that are alive: 4 batches of them, those of the batches ahead, and pieces."""
    return 6 * planner.rows + MAX_AHEAD * (planner.rows // run_length + 1)


def _ahead(prefetch_bytes: int, batch_bytes: int) -> int:
    if prefetch_bytes < 0:
        raise ValueError(f"prefetch_bytes is {prefetch_bytes}; it must not be negative")
    return min(max(prefetch_bytes // batch_bytes, 1), MAX_AHEAD)


def _slice_size(sources: Sequence[Source]) -> tuple[int, int]:
    y, x = np.array([source.slice_size for source in sources]).max(axis=0)
    return int(y), int(x)
