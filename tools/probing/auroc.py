"""AUROC within strata: the chance that a positive scores above a negative that the same probe scored.

Scores of different folds come from different probes, so a pair counts only within its fold. (Pooled over folds, scores
without any signal fall below 0.5: where a fold holds many positives, the others hold few, and its probe scores low.)
"""

from __future__ import annotations

import numpy as np


def auroc(scores: np.ndarray, labels: np.ndarray, strata: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """float64 (r,): AUROC under each of r weightings; NaN where no stratum has a positive and a negative.

    The sum over pairs of a positive and a negative of one stratum, weight · weight where the positive scores higher and
    half of it where both score alike, over the sum of all those weights.

    scores: float (n,), finite; labels: bool (n,); strata: int (n,); weights: (r, n), none negative; None: one of ones.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    above, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        rows = rows[np.argsort(scores[rows], kind="stable")]
        starts = np.flatnonzero(np.diff(scores[rows], prepend=np.nan) != 0)
        positive = np.add.reduceat(weights[:, rows] * labels[rows], starts, axis=1)
        negative = np.add.reduceat(weights[:, rows] * ~labels[rows], starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        above += (positive * (below + negative / 2)).sum(axis=1)
        pairs += positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(above, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
