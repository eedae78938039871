"""The protocol of docs/evaluation.md in numbers: folds, what may be tuned and over which values, intervals, draws.

Invariant: a patient's fold, and its place in any draw, is a pure function of its pseudonym: never of the set, of other
patients, of labels or of a network. Who changes a number here raises VERSION: figures of two versions do not compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

VERSION = 1
FOLD_SEED = 0
FOLDS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""C of the logistic probe: one over the weight of half the squared coefficients, for standardised features."""
STRENGTH_UNCHOSEN = 1.0
"""C where the training patients are too few for one to be chosen."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the kNN probe: neighbours by cosine similarity s, each with the weight exp(s / temperature)."""
WINDOW_EVERY_MM = 5.0
"""How far apart the windows of `presence` are."""
RESAMPLES, COVERAGE = 1000, 0.95
"""Of the bootstrap over patients."""
PAIRS = 25
"""Fewer pairs of a positive and a negative within folds give an AUROC no interval: resamples of four pairs that happen
to be in order are all in order."""
FRACTIONS, DRAWS = (0.01, 0.1, 1.0), 5
"""Of the curve over labelled patients."""
MALIGNANCY_READERS, MALIGNANCY_MIDDLE, MALIGNANCY_AIM = 3, 3.0, 0.90
DENSE_FINDINGS, DENSE_PATIENTS = 2, 200
"""At most so many findings of a patient, and patients, are in the dense probe: its patches lie in memory."""
DENSE_STEPS, DENSE_BATCH, DENSE_RATE, DENSE_DECAY, DENSE_HIDDEN = 200, 8, 1e-3, 1e-2, 32


def place(patient: str, *kind: object) -> int:
    """A patient's place in the order of this kind: the first 8 bytes of sha256("probe NUL kind … NUL patient")."""
    text = "\0".join(map(str, ("probe", *kind, patient)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def fold_of(patient: str) -> int:
    """0 to FOLDS - 1."""
    return place(patient, "fold", FOLD_SEED) % FOLDS


def shuffled(patients: Iterable[str], *kind: object) -> list[str]:
    """Each patient once, in the order of this kind: who is among the first n stays so when others are taken away."""
    return sorted(set(patients), key=lambda patient: (place(patient, *kind), patient))


def generator(seed: int, *kind: object) -> np.random.Generator:
    """Random numbers for one purpose."""
    return np.random.Generator(np.random.PCG64(place("", seed, *kind)))


def in_words() -> dict[str, Any]:
    """What probe.json says of the protocol."""
    return {
        "version": VERSION,
        "fold_seed": FOLD_SEED,
        "folds": FOLDS,
        "logistic_C": list(STRENGTHS),
        "knn": {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE},
        "window_every_mm": WINDOW_EVERY_MM,
        "bootstrap": {"unit": "patient", "resamples": RESAMPLES, "coverage": COVERAGE, "pairs": PAIRS},
        "curve": {"fractions": list(FRACTIONS), "draws": DRAWS},
        "dense": {
            "findings_of_a_patient": DENSE_FINDINGS,
            "patients": DENSE_PATIENTS,
            "steps": DENSE_STEPS,
            "batch": DENSE_BATCH,
            "learning_rate": DENSE_RATE,
            "weight_decay": DENSE_DECAY,
            "hidden": DENSE_HIDDEN,
        },
    }
