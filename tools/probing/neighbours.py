"""The kNN probe: the share of positives among a row's nearest known rows, the nearer the heavier. Nothing is tuned."""

from __future__ import annotations

import numpy as np

from probing import protocol


def neighbour_scores(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """float64 (m,): 0 to 1, for rows (m, d) by known rows (n, d) of bool labels (n,).

    Each of the NEIGHBOURS most similar known rows (all, where there are fewer) weighs exp(cosine / TEMPERATURE). Of
    equally similar rows the first are taken.
    """
    similarity = _unit(asked) @ _unit(known).T
    count = min(protocol.NEIGHBOURS, len(known))
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    cosine = np.take_along_axis(similarity, nearest, axis=1)
    weights = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / protocol.TEMPERATURE)
    return (weights * labels[nearest]).sum(axis=1) / weights.sum(axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
