"""Patch features as colours that can be followed over time.

Components of two checkpoints are not the same axes: signs are free, and equal spreads change places. The scores of a
look are therefore turned onto those of the look before (orthogonal Procrustes on the same patches of the same slices),
and only then stretched into colours.

Legend: n patches, of all slices; d features.
"""

from __future__ import annotations

import numpy as np

STRETCH = (1.0, 99.0)
"""Percentiles of a score that become 0 and 1."""
COMPONENTS = 3


def principal_scores(features: np.ndarray) -> np.ndarray:
    """float64 (n, 3): scores of the first three principal components of features (n, d), each of variance 1.

    A component without spread is 0, and all are where features are not finite. Its sign: the entry of largest magnitude
    of its direction is positive.
    """
    if not np.isfinite(features).all():
        return np.zeros((len(features), COMPONENTS))
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :COMPONENTS]
    largest = np.abs(directions).argmax(axis=0)
    scores = centred @ (directions * np.sign(directions[largest, np.arange(directions.shape[1])]))
    spread = scores.std(axis=0)
    # Rounding leaves a spread in components that have none; it must not be stretched into colours.
    real = spread > 1e-6 * max(float(np.abs(features).max()), 1e-30)
    whole = np.zeros((len(features), COMPONENTS))
    whole[:, : scores.shape[1]] = np.where(real, scores / np.where(real, spread, 1.0), 0.0)
    return whole


def turned_onto(scores: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """The scores (n, 3), rotated or mirrored to be nearest to `reference` (n, 3) in squares; None: as they are.

    Source: Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 31 (1966).
    """
    if reference is None or reference.shape != scores.shape:
        return scores
    left, _, right = np.linalg.svd(scores.T @ reference)
    return scores @ (left @ right)


def colours_of(scores: np.ndarray) -> np.ndarray:
    """uint8 (n, 3): each score from its 1st to its 99th percentile; 128 where it has no spread."""
    low, high = np.percentile(scores, STRETCH, axis=0)
    real = high - low > 1e-9
    shown = np.clip((scores - low) / np.where(real, high - low, 1.0), 0.0, 1.0)
    return np.rint(255 * np.where(real, shown, 0.5)).astype(np.uint8)
