"""Whether a view finds another view of its own slice among those of other slices, its neighbours among them.

Invariant: equal similarities count as a draw by lot, so that features that have collapsed give chance and no more; a
figure stands beside its chance level, never as a multiple of it, which would grow with the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinox_train.keyed import uniform

TURNS = 1000
"""Of the bootstrap."""
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Ranking:
    """For each of q queries, where its match stands among n gallery entries by cosine similarity."""

    before: np.ndarray
    """int64 (q,): entries that are more similar than the match."""
    tied: np.ndarray
    """int64 (q,): other entries that are exactly as similar."""
    near: np.ndarray
    """float64 (q,): the share, of the entries that are the most similar, that are of the query's own run."""
    num_entries: int


def rank(queries: np.ndarray, gallery: np.ndarray, match: np.ndarray, run: np.ndarray) -> Ranking | None:
    """Rank the gallery for each query; None where features are not finite, which no comparison would tell.

    queries (q, d) and gallery (n, d): features; match: int (q,), the entry that is to be found; run: int (n,), equal
    for entries that are neighbours.
    """
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        return None
    similarity = _directions(queries) @ _directions(gallery).T
    own = similarity[np.arange(len(match)), match][:, None]
    best = similarity == similarity.max(axis=1, keepdims=True)
    neighbours = run[None, :] == run[match][:, None]
    return Ranking(
        before=(similarity > own).sum(axis=1),
        tied=(similarity == own).sum(axis=1) - 1,
        near=(best & neighbours).sum(axis=1) / best.sum(axis=1),
        num_entries=len(gallery),
    )


def figures(ranking: Ranking, patients: Sequence[str], run_length: int, seed: int) -> dict[str, dict[str, Any]]:
    """top1, top5, mrr, and near1: the first is a slice of the query's run. Each: value, low, high and chance.

    patients: (q,), whose query it is. low and high: the 95 % interval of a bootstrap over patients (percentiles of
    1,000 draws); None where there is one patient. chance: of an order by lot.
    """
    n = ranking.num_entries
    scores = {
        "top1": (expected(ranking, lambda place: place <= 1), 1 / n),
        "top5": (expected(ranking, lambda place: place <= 5), min(5, n) / n),
        "mrr": (expected(ranking, lambda place: 1 / place), float((1 / np.arange(1, n + 1)).sum() / n)),
        "near1": (ranking.near, run_length / n),
    }
    found = {}
    for name, (values, chance) in scores.items():
        low, high = interval(values, patients, seed)
        found[name] = {"value": float(values.mean()), "low": low, "high": high, "chance": chance}
    return found


def expected(ranking: Ranking, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """float64 (q,): what a score of the match's place (from 1) is on average, where ties are ordered by lot."""
    places = score(np.arange(1, ranking.num_entries + 1).astype(np.float64)).astype(np.float64)
    sums = np.concatenate(([0.0], np.cumsum(places)))
    return (sums[ranking.before + ranking.tied + 1] - sums[ranking.before]) / (ranking.tied + 1)


def interval(values: np.ndarray, patients: Sequence[str], seed: int) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of values (q,) if other patients had been drawn; (None, None) of one patient."""
    names, number = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2:
        return None, None
    sums, counts = np.bincount(number, values), np.bincount(number)
    chosen = uniform(seed, "monitor.bootstrap", 0, np.arange(TURNS), 1, len(names))[:, 0]
    rows = np.floor(chosen * len(names)).astype(np.int64)
    low, high = np.percentile(sums[rows].sum(axis=1) / counts[rows].sum(axis=1), PERCENTILES)
    return float(low), float(high)


def _directions(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1.0)
