"""Shortcuts: can the scanner, or the set that a scan comes from, be told from the features?

A network can lower its loss by telling scans apart by what the scanner left in them (noise, kernel, scale) and not by
the anatomy. For each fact the nearest neighbours of a window among those of *other* patients vote on its value; how
often they are right is compared with always saying the most frequent value. Some of it is no fault: sets of different
organs differ in anatomy. Only features that tell the scanner and hardly tell the height in the body (knn_z) are a
shortcut (dinox_train/alarms.py).

Invariant: training patients only, none of whom votes on himself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinox_io import ShardSet
from dinox_train.nearest import CHUNK_ROWS

FACTS = ("manufacturer", "kernel", "kvp", "thickness_mm")
"""Of a volume's KEY.json (docs/format.md); beside them `dataset`, where a run mixes several."""
FEWEST_PATIENTS = 2
"""Of a value: with one alone, nobody else could vote for it."""


@dataclass(frozen=True)
class Shortcut:
    """How well a fact can be told."""

    name: str
    accuracy: float
    """Share of the windows whose neighbours are right."""
    chance: float
    """Share of the most frequent value."""

    @property
    def share(self) -> float:
        """Of what chance leaves to be told, how much is: 1 all, 0 nothing, below 0 less than chance."""
        return (self.accuracy - self.chance) / (1 - self.chance)


def strongest(
    features: Tensor, patients: Sequence[str], facts: Mapping[str, Sequence[str | None]], k: int = 10
) -> Shortcut | None:
    """The fact that is told best; None where no fact has two values of two patients each, or features are not finite.

    features: (n, d) of windows; patients (n,); facts: by name the value of each window, None where it is not known.
    """
    if not bool(torch.isfinite(features).all()):
        return None
    found = (told(name, features, patients, values, k) for name, values in facts.items())
    return max((one for one in found if one is not None), key=lambda one: one.share, default=None)


def told(
    name: str, features: Tensor, patients: Sequence[str], values: Sequence[str | None], k: int = 10
) -> Shortcut | None:
    """How well the k nearest windows of other patients tell `values`, by majority; None where there is too little.

    Windows whose value is not known, or is that of one patient only, are left out.
    """
    of_value: dict[str, set[str]] = defaultdict(set)
    for value, patient in zip(values, patients, strict=True):
        if value is not None:
            of_value[value].add(patient)
    classes = {
        value: number for number, value in enumerate(sorted(of_value)) if len(of_value[value]) >= FEWEST_PATIENTS
    }
    rows = [row for row, value in enumerate(values) if value in classes]
    if len(classes) < 2:
        return None
    numbers = {patient: number for number, patient in enumerate(sorted(set(patients)))}
    kinds = torch.tensor([classes[str(values[row])] for row in rows])
    persons = torch.tensor([numbers[patients[row]] for row in rows])
    directions = torch.nn.functional.normalize(features[rows].float().cpu(), dim=1)
    right = 0
    for mine in torch.arange(len(rows)).split(CHUNK_ROWS):
        cosines = directions[mine] @ directions.T
        cosines[persons[mine, None] == persons[None]] = -torch.inf
        nearest = cosines.topk(min(k, len(rows)), dim=1)
        votes = torch.zeros(len(mine), 1 + max(classes.values()))
        votes.scatter_add_(1, kinds[nearest.indices], torch.isfinite(nearest.values).float())
        right += int((votes.argmax(dim=1) == kinds[mine]).sum())
    chance = max(Counter(kinds.tolist()).values()) / len(rows)
    return Shortcut(name, right / len(rows), chance)


class ScannerFacts:
    """What volumes' records say of the scan, read once for each volume."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self._sets = list(sets)
        self._known: dict[tuple[int, int], dict[str, str | None]] = {}

    def of(self, places: Sequence[tuple[ShardSet, int]]) -> dict[str, list[str | None]]:
        """By name, the value of each place (a set, and the index of a volume in it). Raises ShardError for damage."""
        found = [self._of_volume(self._sets.index(shards), volume) for shards, volume in places]
        names = (*FACTS, "dataset") if len(self._sets) > 1 else FACTS
        return {name: [facts[name] for facts in found] for name in names}

    def _of_volume(self, number: int, volume: int) -> dict[str, str | None]:
        if (number, volume) not in self._known:
            facts = self._sets[number].facts(volume)
            self._known[number, volume] = {
                **{name: _value(facts.get(name)) for name in FACTS},
                "dataset": str(number),
            }
        return self._known[number, volume]


def _value(fact: Any) -> str | None:
    """As text that is equal for equal values; None for none, and for one that changes from slice to slice."""
    if isinstance(fact, int | float) and not isinstance(fact, bool):
        return f"{fact:.2f}"
    return fact if isinstance(fact, str) and fact else None
