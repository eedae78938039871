"""The DINO and the iBOT loss from the teacher's logits and their potential, on the kernel of balanced_cross_entropy.py.

Their references are dinox_train/objectives/dino.py and ibot.py, which take targets; what differs is how pairs of rows
are told to one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinox_train.kernels.balanced_cross_entropy import balanced_cross_entropy


def view_pairs(num_student_views: int, num_teacher_views: int, num_images: int, device: torch.device) -> Tensor:
    """DINO's pairs: int64 (S*b, P) rows of the teacher's logits (T*b, K) for rows of the student's (S*b, K), both
    view-major; -1 where both would be of one view, and up to the power of two that P is."""
    width = 1 << (num_teacher_views - 1).bit_length()
    s_S11 = torch.arange(num_student_views, device=device)[:, None, None]
    b_1B1 = torch.arange(num_images, device=device)[None, :, None]
    t_11P = torch.arange(width, device=device)[None, None, :]
    paired = (t_11P != s_S11) & (t_11P < num_teacher_views)
    return torch.where(paired, t_11P * num_images + b_1B1, -1).flatten(0, 1)


def fused_dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    potential: Tensor,
    *,
    num_student_views: int,
    num_teacher_views: int,
    student_temperature: float,
    teacher_temperature: float,
    local_weight: float = 1.0,
    total_rows: int | None = None,
) -> Tensor:
    """`dino_loss` of the targets that `teacher_logits` (T*b, K) and `potential` (K,) stand for; the rest as there."""
    num_images = len(teacher_logits) // num_teacher_views
    shared = min(num_student_views, num_teacher_views)
    num_pairs = num_student_views * num_teacher_views - shared
    if num_pairs < 1 or not num_images or len(student_logits) != num_student_views * num_images:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} make no "
            f"pairs of {num_student_views} and {num_teacher_views} views"
        )
    losses_R = balanced_cross_entropy(
        student_logits,
        teacher_logits,
        potential,
        view_pairs(num_student_views, num_teacher_views, num_images, student_logits.device),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    of_global, of_local = losses_R[: shared * num_images].sum(), losses_R[shared * num_images :].sum()
    return (of_global + local_weight * of_local) / (num_pairs * (total_rows or num_images))


def fused_ibot_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    potential: Tensor,
    weights: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    total_crops: int,
) -> Tensor:
    """`ibot_loss` of the targets that `teacher_logits` (m, K) and `potential` (K,) stand for; the rest as there."""
    if student_logits.shape != teacher_logits.shape or weights.shape != student_logits.shape[:1] or total_crops < 1:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)} and weights "
            f"{tuple(weights.shape)} of {total_crops} crops are not (m, K), (m, K) and (m,) of at least one"
        )
    losses_M = balanced_cross_entropy(
        student_logits,
        teacher_logits,
        potential,
        torch.arange(len(student_logits), device=student_logits.device)[:, None],
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    return (weights.float() * losses_M).sum() / total_crops
