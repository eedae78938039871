"""Nearest neighbours in feature space: what a frozen feature knows of a number or a mark, without any training."""

import torch
from torch import Tensor

CHUNK_ROWS = 1024  # queries per similarity matrix; fixed, so that rounding never depends on the free memory


def nearest_mean(known_features: Tensor, known_values: Tensor, features: Tensor, k: int = 10) -> Tensor:
    """Predict each row's value as the plain mean of the values of its k nearest known rows by cosine similarity.

    Every neighbour weighs the same: a temperature would be one more number to tune, and for a quantity as smooth as the
    height of a slice it changes little. With fewer than k known rows all of them count.

    known_features: (n, d); known_values: (n,); features: (m, d), all on one device. Returns float32 (m,) there.
    """
    if k < 1:
        raise ValueError(f"k is {k}; at least one neighbour is needed")
    known = torch.nn.functional.normalize(known_features.float(), dim=1)
    queries = torch.nn.functional.normalize(features.float(), dim=1)
    values = known_values.float()
    neighbours = min(k, len(known))
    predicted = [
        values[(rows @ known.T).topk(neighbours, dim=1).indices].mean(dim=1) for rows in queries.split(CHUNK_ROWS)
    ]
    return torch.cat(predicted) if predicted else values.new_empty(0)


def height_r2(
    train_features: Tensor, train_height: Tensor, val_features: Tensor, val_height: Tensor, k: int = 10
) -> float | None:
    """`knn_z`: R² of a slice's height in its volume, predicted by `nearest_mean` from the training patients' slices.

    1 is perfect, 0 is no better than the mean height of the validation slices, below 0 is worse than that (kept as it
    is). None where it is not defined: no training or validation slices, validation heights that are all equal, or
    features that are not finite.

    train_features: (n, d); train_height: (n,) fractions 0..1; val_features: (m, d); val_height: (m,) fractions 0..1.
    The caller sees to it that no patient stands on both sides.
    """
    _check_sides(train_features, train_height, "train")
    _check_sides(val_features, val_height, "val")
    if len(train_features) == 0 or len(val_features) == 0:
        return None
    if not bool(torch.isfinite(train_features).all() & torch.isfinite(val_features).all()):
        return None
    heights = val_height.double()
    total = (heights - heights.mean()).square().sum()
    if bool(heights.max() == heights.min()):
        return None
    predicted = nearest_mean(train_features, train_height, val_features, k).double()
    return float(1 - (heights - predicted).square().sum() / total)


def mark_auroc(
    train_features: Tensor, train_marked: Tensor, val_features: Tensor, val_marked: Tensor, k: int = 10
) -> float | None:
    """`knn_label`: AUROC of "this slice bears a mark", scored by the share of marked slices among the k nearest of the
    training patients.

    1 is perfect, 0.5 is chance. None where it is not defined: a side without marked or without unmarked slices, or
    features that are not finite. Shapes as for `height_r2`, with 1.0 and 0.0 for heights.
    """
    _check_sides(train_features, train_marked, "train")
    _check_sides(val_features, val_marked, "val")
    if any(len(side) == 0 or bool(side.max() == side.min()) for side in (train_marked, val_marked)):
        return None
    if not bool(torch.isfinite(train_features).all() & torch.isfinite(val_features).all()):
        return None
    return auroc(nearest_mean(train_features, train_marked, val_features, k), val_marked > 0)


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs of a positive and a negative in which the positive has the higher score; ties count half.

    scores: (n,); positive: bool (n,), some of each kind.
    """
    values, counts = scores.double().unique(return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[torch.searchsorted(values, scores.double())]  # of equal scores, their mean rank
    positives, negatives = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _check_sides(features: Tensor, heights: Tensor, side: str) -> None:
    if features.ndim != 2 or heights.shape != features.shape[:1]:
        raise ValueError(
            f"{side}: features {tuple(features.shape)} and heights {tuple(heights.shape)} do not match; "
            "needed are (n, d) and (n,)"
        )
