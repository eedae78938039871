"""Which slices a monitor looks at: a keyed choice, spread over patients, a pure function of the set and a seed.

Invariant: a choice depends on pseudonyms and numbers of slices, never on the order of volumes in a set or on a path.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TypeVar

import numpy as np

from dinox_io import ShardSet
from dinox_train.sections import DataSection

Item = TypeVar("Item")
MIDDLE = (0.1, 0.9)
"""Between these heights of a volume slices of pictures are chosen: the ends show little."""


@dataclass(frozen=True)
class Stack:
    """The windows of one volume."""

    set: int
    """Number of its set."""
    volume: int
    """Its index there."""
    id: str
    patient: str
    centers: range
    """Middle slices that windows may have."""
    step: int
    """How far apart a window's slices are, in slices."""


@dataclass(frozen=True)
class Place:
    """One window: its volume and its middle slice."""

    stack: Stack
    center: int


def stacks_of(sets: Sequence[ShardSet], side: str | None, data: DataSection) -> list[Stack]:
    """The volumes of a side (None: all) that have windows as the run cuts them; every slice may be a middle one."""
    found = []
    for number, shards in enumerate(sets):
        if side is not None and all(volume.split != side for volume in shards.volumes):
            continue
        table = shards.window_table(shards.volumes_of(side), data.depth, data.step, step_mm=data.step_mm)
        columns = (table.volume, table.first_center, table.centers, table.step)
        for index, first, count, step in np.stack(columns, axis=1).tolist():
            record = shards.volumes[index]
            if count:
                found.append(Stack(number, index, record.id, record.patient, range(first, first + count), step))
    return found


def choose_slices(stacks: Sequence[Stack], count: int, seed: int) -> list[Place]:
    """`count` slices, each of another patient as far as there are so many; fewer where the side has no more."""

    def of_patient(own: list[Stack]) -> list[Place]:
        piles = [[Place(stack, z) for z in dict.fromkeys(_heights(stack, count, seed))] for stack in own]
        return deal(piles, count)

    return deal(_by_patient(stacks, seed, "slices", count, of_patient), count)


def choose_runs(stacks: Sequence[Stack], count: int, length: int, seed: int) -> list[tuple[Place, ...]]:
    """`count` runs of `length` neighbouring slices, none of which overlap; fewer where the side has no more."""

    def of_patient(own: list[Stack]) -> list[tuple[Place, ...]]:
        runs = [
            (drawn(seed, "runs", stack.id, str(start)), stack, start)
            for stack in own
            for start in range(0, len(stack.centers) - length + 1, length)
        ]
        ordered = sorted(runs, key=lambda run: run[0])[:count]
        return [tuple(Place(stack, stack.centers[start + z]) for z in range(length)) for _, stack, start in ordered]

    return deal(_by_patient(stacks, seed, "runs", None, of_patient), count)


def deal(piles: Sequence[Sequence[Item]], count: int) -> list[Item]:
    """The first of each pile, then the second of each, and so on: `count` in all, or as many as there are."""
    turns = zip_longest(*piles, fillvalue=None)
    return list(islice((item for turn in turns for item in turn if item is not None), count))


def drawn(seed: int, *words: str) -> float:
    """A uniform number in [0, 1): a function of the seed and the words alone."""
    digest = hashlib.sha256("\0".join((str(seed), *words)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _heights(stack: Stack, count: int, seed: int) -> Iterator[int]:
    low, high = MIDDLE
    for number in range(count):
        height = low + (high - low) * drawn(seed, "height", stack.id, str(number))
        yield stack.centers[int(height * len(stack.centers))]


def _by_patient(
    stacks: Sequence[Stack],
    seed: int,
    stream: str,
    most: int | None,
    of_patient: Callable[[list[Stack]], list[Item]],
) -> list[list[Item]]:
    """A pile for each patient that has any; of no more than `most` patients (None: of all)."""
    patients: dict[str, list[Stack]] = defaultdict(list)
    for stack in stacks:
        patients[stack.patient].append(stack)
    piles = []
    for patient in sorted(patients, key=lambda name: drawn(seed, stream, "patient", name)):
        own = sorted(patients[patient], key=lambda stack: drawn(seed, stream, "volume", stack.id))
        piles.append(of_patient(own))
        if most is not None and len(piles) == most:
            break
    return [pile for pile in piles if pile]
