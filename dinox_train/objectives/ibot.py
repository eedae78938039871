"""The iBOT loss: of a patch that it does not see, the student is to predict what the teacher, who sees it, says.

Legend: m masked patches (of all crops together), K prototypes, M_i the masked patches of crop i, tau temperature.

    loss = 1 / crops * sum over crops i, 1 / |M_i| * sum over patches j in M_i, of the cross-entropy
           logsumexp_k(z_jk / tau) - sum_k target_jk z_jk / tau

(Zhou et al., iBOT, arXiv 2111.07832, equation 2, with DINOv2's weights.) `crops` counts the crops without a masked
patch too: with half of the crops masked the loss is half of what a masked crop loses. Rows are masked patches only, so
that the heads never run on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinox_train.objectives.numerics import full_precision


def ibot_loss(
    student_logits: Tensor, targets: Tensor, weights: Tensor, *, student_temperature: float, total_crops: int
) -> Tensor:
    """The loss in nats, a 0-dim tensor: fp32 (fp64 for fp64 logits), with gradients to `student_logits`.

    student_logits, targets: (m, K), each row of the targets summing to 1; weights: (m,), 1 / |M_i| of the crop that a
    patch belongs to; m may be 0. total_crops: global crops of the whole update, masked or not; the losses of its
    micro-batches, and their gradients, then add up to the update's. Raises ValueError for shapes that do not fit.
    """
    if student_logits.ndim != 2 or student_logits.shape != targets.shape or weights.shape != targets.shape[:1]:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, targets {tuple(targets.shape)} and weights "
            f"{tuple(weights.shape)} are not (m, K), (m, K) and (m,)"
        )
    if total_crops < 1:
        raise ValueError(f"total_crops must be at least 1, not {total_crops}")
    z_MK = full_precision(student_logits) / student_temperature
    targets_MK = targets.detach().to(z_MK.dtype)
    losses_M = torch.logsumexp(z_MK, dim=1) - (targets_MK * z_MK).sum(dim=1)
    return (weights.to(z_MK.dtype) * losses_M).sum() / total_crops
