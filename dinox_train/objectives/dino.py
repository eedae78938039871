"""The DINO loss: each view of the student is to predict what the teacher says of another view of the same image.

Legend: S student views, T teacher views (the first T of the S), b images, K prototypes, tau student temperature.

    loss = mean over images and over all pairs (student view s, teacher view t), s != t, of the cross-entropy
           logsumexp_k(z_sk / tau) - sum_k target_tk z_sk / tau

(Caron et al., DINO, arXiv 2104.14294, equation 3.) A student view has the same logits in all its pairs, so its targets
are added up first: one pass over a view's logits in place of one for each pair. Pairs of the S - T further views (the
local crops) may weigh more or less than 1: DINOv3 halves them in its Gram and high-resolution stages. What is divided
by stays the number of pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinox_train.objectives.numerics import full_precision


def dino_loss(
    student_logits: Tensor,
    teacher_targets: Tensor,
    *,
    num_student_views: int,
    num_teacher_views: int,
    student_temperature: float,
    local_weight: float = 1.0,
    total_rows: int | None = None,
) -> Tensor:
    """The loss in nats, a 0-dim tensor: fp32 (fp64 for fp64 logits), with gradients to `student_logits`.

    student_logits: (S*b, K), view-major (view 0 of all images, then view 1, …), the teacher's views first;
    teacher_targets: (T*b, K), view-major, each row summing to 1. local_weight: of the pairs of local crops. total_rows:
    images of the whole update where this is one of its micro-batches; the losses of all micro-batches, and their
    gradients, then add up to the update's. Raises ValueError for shapes that do not fit, or where no pair exists.
    """
    _check(student_logits, teacher_targets, num_student_views, num_teacher_views)
    num_images, num_prototypes = len(teacher_targets) // num_teacher_views, teacher_targets.shape[1]
    z_SBK = full_precision(student_logits).view(num_student_views, num_images, num_prototypes) / student_temperature
    targets_TBK = teacher_targets.detach().to(z_SBK.dtype).view(num_teacher_views, num_images, num_prototypes)
    summed_BK = targets_TBK.sum(dim=0)
    shared = min(num_student_views, num_teacher_views)
    log_sums_S = torch.logsumexp(z_SBK, dim=2).sum(dim=1)
    global_pairs = (num_teacher_views - 1) * log_sums_S[:shared].sum() - (
        z_SBK[:shared] * (summed_BK - targets_TBK[:shared])
    ).sum()
    local_pairs = num_teacher_views * log_sums_S[shared:].sum() - (z_SBK[shared:] * summed_BK).sum()
    num_pairs = num_student_views * num_teacher_views - shared
    return (global_pairs + local_weight * local_pairs) / (num_pairs * (total_rows or num_images))


def _check(student_logits: Tensor, teacher_targets: Tensor, num_student_views: int, num_teacher_views: int) -> None:
    if num_teacher_views < 1 or num_student_views * num_teacher_views <= min(num_student_views, num_teacher_views):
        raise ValueError(f"{num_student_views} student and {num_teacher_views} teacher views make no pair of two views")
    if (
        student_logits.ndim != 2
        or teacher_targets.ndim != 2
        or student_logits.shape[1] != teacher_targets.shape[1]
        or len(student_logits) * num_teacher_views != len(teacher_targets) * num_student_views
        or len(teacher_targets) % num_teacher_views
        or not len(teacher_targets)
    ):
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher targets {tuple(teacher_targets.shape)} are not "
            f"({num_student_views}*b, K) and ({num_teacher_views}*b, K)"
        )
