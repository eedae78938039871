"""Scores of units by probes that never saw their patients: one probe a fold, or one for the whole test side.

Invariant: no patient is on both sides of a split, and nothing of the tested patients reaches the probe: not the scaling
of features, not the choice of C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from probing import protocol
from probing.logistic import logistic_scores
from probing.neighbours import neighbour_scores

CLASSIFIERS = ("logistic", "kNN")
"""The first is the figure of a task."""


@dataclass(frozen=True, eq=False)
class Split:
    """Patients to train on and to test, disjoint."""

    number: int
    train: frozenset[str]
    test: frozenset[str]


def splits(train: set[str], test: set[str], *, held_out: bool) -> list[Split]:
    """The splits of a probe; folds without a tested patient are left out.

    train: patients that a probe may learn from; test: those to be tested, in or outside `train`. held_out: the test
    side as a whole, by one probe of all `train`; else each tested patient by the probe of all others' folds.
    """
    if held_out:
        return [Split(0, frozenset(train - test), frozenset(test))]
    found = []
    for fold in range(protocol.FOLDS):
        tested = frozenset(patient for patient in test if protocol.fold_of(patient) == fold)
        if tested:
            known = frozenset(patient for patient in train if protocol.fold_of(patient) != fold)
            found.append(Split(fold, known, tested))
    return found


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of the tested units."""

    units: np.ndarray
    """int64 (t,): which."""
    scores: np.ndarray
    """float64 (t,)."""
    strata: np.ndarray
    """int64 (t,): the split that each was tested in."""
    unfitted: int
    """Splits whose training patients show one class only: all their units score alike."""


Choice = Callable[[Split], frozenset[str]]
"""Which of a split's training patients are taken."""


def crossfit(
    classifier: str,
    features: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    parts: Sequence[Split],
    choice: Choice | None = None,
) -> Scored:
    """Score every tested unit once. features: (u, d); labels: bool (u,); patients: str (u,)."""
    units, scores, strata, unfitted = [], [], [], 0
    folds = np.array([protocol.fold_of(patient) for patient in patients])
    for part in parts:
        known = np.isin(patients, sorted(part.train if choice is None else choice(part)))
        asked = np.isin(patients, sorted(part.test))
        if not asked.any():
            continue
        unfitted += len(np.unique(labels[known])) < 2
        units.append(np.flatnonzero(asked))
        scores.append(_scores(classifier, features[known], labels[known], folds[known], features[asked]))
        strata.append(np.full(int(asked.sum()), part.number))
    if not units:
        return Scored(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), unfitted)
    return Scored(np.concatenate(units), np.concatenate(scores), np.concatenate(strata), unfitted)


def _scores(classifier: str, known: np.ndarray, labels: np.ndarray, folds: np.ndarray, asked: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(asked))
    if classifier == "kNN":
        return neighbour_scores(known, labels, asked)
    return logistic_scores(known, labels, folds, asked)


def some_of(fraction: float, draw: int, seed: int) -> Choice:
    """A fraction of the labelled training patients, at least one; another draw takes others."""

    def choice(part: Split) -> frozenset[str]:
        order = protocol.shuffled(part.train, "curve", seed, draw)
        return frozenset(order[: max(1, -int(-fraction * len(order) // 1))])

    return choice
