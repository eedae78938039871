"""The loss of labelled images: one yes/no question about each of b images.

binary_cross_entropy  1 / rows * sum_i (softplus(z_i) - label_i z_i)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dinox_train.objectives.numerics import full_precision


def binary_cross_entropy(logits: Tensor, labels: Tensor, *, total_rows: int | None = None) -> Tensor:
    """The loss in nats, a 0-dim tensor: fp32 (fp64 for fp64 logits), with gradients to `logits`.

    logits, labels: (b,), labels in [0, 1]. total_rows: images of the whole update where this is one of its
    micro-batches; their losses, and gradients, then add up to the update's. Raises ValueError for shapes that do not
    fit.
    """
    if logits.ndim != 1 or labels.shape != logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are not both (b,)")
    z_B = full_precision(logits)
    return (F.softplus(z_B) - labels.to(z_B.dtype) * z_B).sum() / (total_rows or len(logits))
