"""Figures of features: whether views differ, in how many directions, whether patches do, and how far they moved."""

from __future__ import annotations

import numpy as np
import torch

from dinox_train.health import effective_rank, feature_std, patch_similarity
from dinox_train.objectives.gram import gram_loss


def of_embeddings(embeddings: np.ndarray) -> dict[str, float | None]:
    """feature_std and effective_rank as a run's own (`dinox_train.health`), and the mean length, of (m, d)."""
    features = torch.from_numpy(embeddings)
    return {
        "feature_std": finite(float(feature_std(features))),
        "effective_rank": finite(float(effective_rank(features))),
        "mean_norm": finite(float(features.double().norm(dim=1).mean())),
    }


def gram_drift(patches: np.ndarray, others: np.ndarray) -> float | None:
    """How far the similarities between patches are from another network's: the root mean square, over slices and pairs
    of patches, of the difference of their cosine similarities. 0: none; None where features are not finite.

    patches, others: (s, n, d) and (s, n, e) of the same patches. The root of Gram anchoring's loss, sources there.
    """
    if patches.shape[-1] != others.shape[-1]:
        raise ValueError(f"patches of {patches.shape[-1]} and of {others.shape[-1]} features are of other networks")
    return finite(float(gram_loss(torch.from_numpy(patches), torch.from_numpy(others)).double().sqrt()))


def dense_collapse(patches: np.ndarray) -> float | None:
    """`dinox_train.health.patch_similarity` of patches (s, n, d)."""
    return finite(float(patch_similarity(torch.from_numpy(patches))))


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if np.isfinite(value) else None
