"""Gram anchoring: the similarities between an image's patches are to stay those of an earlier, frozen network.

Legend: c crops, n patches of a crop, d features, s the student's, g the Gram teacher's patches, each of length 1.

    loss = 1 / crops * sum over crops, mean over pairs of patches (i, j), of (<s_i, s_j> - <g_i, g_j>)^2

(Siméoni et al., DINOv3, arXiv 2508.10104, section 4.2, taken image by image.) Everything is fp32.

Both sides are nearly equal for most of a run, so the difference is formed before any product: with e = s - g, t = s + g

    s s' - g g' = (e t' + t e') / 2
    || s s' - g g' ||^2 = (<e'e, t't> + <e't, t'e>) / 2

The first costs one product of n x n values in place of two, the second three of d x d, whichever is cheaper. Neither
has the cancellation of ||s's||^2 - 2 ||s'g||^2 + ||g'g||^2, whose fp32 rounding is of the size of the terms (1e-7 of
the mean square similarity) however small the loss is; here it is of the size of e^2.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinox_train.objectives.numerics import directions, full_precision, without_autocast

Negatives = Literal["keep", "clamp_both", "clamp_teacher"]
"""What becomes of negative similarities: stay; 0 in both; 0 in the teacher's, which the student's then shall approach.

DINOv3's code has a switch that is to clear the teacher's, and the student's where the teacher's are negative. Its
second half looks at similarities that its first half has set to 0 already, and finds none: what runs is
`clamp_teacher`.
"""
NEGATIVES: tuple[Negatives, ...] = ("keep", "clamp_both", "clamp_teacher")


def gram_loss(
    student_patches: Tensor,
    teacher_patches: Tensor,
    *,
    negatives: Negatives = "keep",
    tokens: Tensor | None = None,
    total_crops: int | None = None,
) -> Tensor:
    """The loss, a 0-dim tensor: fp32 (fp64 for fp64 patches), with gradients to `student_patches`.

    student_patches, teacher_patches: (c, n, d), on one grid (`resize_features`), of any length; d may differ, but for
    `negatives="keep"` not. tokens: bool (c, n), the patches that count; a crop's mean is over pairs of them, a crop
    without any adds 0. It saves no time: to bound the cost take a subset first (`take_patches`). total_crops: what the
    sum over crops is divided by, default c; given the crops of the whole update, the losses of its micro-batches, and
    their gradients, add up to the update's. Crops without tokens count too: of masked patches only, where half of the
    crops have any, the loss is half their mean, as iBOT's is. Raises ValueError for shapes that do not fit.
    """
    _check(student_patches, teacher_patches, negatives, tokens)
    with without_autocast(student_patches):
        s_CND = directions(full_precision(student_patches))
        g_CND = directions(full_precision(teacher_patches.detach()).to(s_CND.dtype))
        num_crops, n = s_CND.shape[:2]
        pairs_C = s_CND.new_full((num_crops,), n * n)
        if tokens is not None:
            # Zeros are orthogonal to all: their pairs differ by 0 in every form.
            s_CND, g_CND = s_CND * tokens[..., None], g_CND * tokens[..., None]
            pairs_C = tokens.sum(dim=1).to(s_CND.dtype).square().clamp(min=1)
        squares_C = _square_differences(s_CND, g_CND, negatives)
        return (squares_C / pairs_C).sum() / (total_crops or max(1, num_crops))


def resize_features(patches: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Features (c, h*w, d) of a grid of patches on another grid (c, new_h*new_w, d): bicubic (a = -0.75, corners not
    aligned, no antialiasing), fp32. They are to be resized before they are brought to length 1, as `gram_loss` does.

    grid, new_grid: (rows, columns). Raises ValueError where the patches are not those of `grid`.
    """
    if patches.ndim != 3 or patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"patches {tuple(patches.shape)} are not (c, {grid[0]} * {grid[1]}, d)")
    features = full_precision(patches)
    if grid == new_grid:
        return features
    images_CDHW = features.transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(images_CDHW, size=new_grid, mode="bicubic", align_corners=False, antialias=False)
    return resized.flatten(2).transpose(1, 2)


def take_patches(patches: Tensor, indices: Tensor | None) -> Tensor:
    """Some patches of each crop: (c, m, d) of patches (c, n, d) and int64 indices (c, m); None: all."""
    if indices is None:
        return patches
    return patches.gather(1, indices[..., None].expand(-1, -1, patches.shape[2]))


def gram_flops(num_patches: int, width: int, negatives: Negatives) -> int:
    """What the loss and its gradient take for one crop and layer: 2 for each multiplication with addition of a matrix
    product."""
    if negatives != "keep":
        return 4 * 2 * num_patches**2 * width
    if _by_features(num_patches, width):
        return 9 * 2 * num_patches * width**2
    return 3 * 2 * num_patches**2 * width


def _by_features(num_patches: int, width: int) -> bool:
    # 9 products of n d^2 with the backward pass, against 3 of n^2 d and some passes over n^2 values: measured on a CPU.
    return 5 * width < 2 * num_patches


def _square_differences(s_CND: Tensor, g_CND: Tensor, negatives: Negatives) -> Tensor:
    """(c,): sum over pairs of patches of the squared difference of similarities."""
    if negatives != "keep":
        ours_CNN, theirs_CNN = s_CND @ s_CND.transpose(1, 2), g_CND @ g_CND.transpose(1, 2)
        if negatives == "clamp_both":
            ours_CNN = ours_CNN.clamp(min=0)
        return (ours_CNN - theirs_CNN.clamp(min=0)).square().sum(dim=(1, 2))
    e_CND, t_CND = s_CND - g_CND, s_CND + g_CND
    if _by_features(*s_CND.shape[1:]):
        return _of_features(e_CND, t_CND)
    return _of_similarities(e_CND, t_CND)


def _of_similarities(e_CND: Tensor, t_CND: Tensor) -> Tensor:
    half_CNN = e_CND @ t_CND.transpose(1, 2)
    return (half_CNN + half_CNN.transpose(1, 2)).square().sum(dim=(1, 2)) / 4


def _of_features(e_CND: Tensor, t_CND: Tensor) -> Tensor:
    e_CDN = e_CND.transpose(1, 2)
    mixed_CDD = e_CDN @ t_CND
    same = ((e_CDN @ e_CND) * (t_CND.transpose(1, 2) @ t_CND)).sum(dim=(1, 2))
    # Rounding may leave a little below 0 where the student is the teacher, rotated: no loss, but no logarithm's food.
    return ((same + (mixed_CDD * mixed_CDD.transpose(1, 2)).sum(dim=(1, 2))) / 2).clamp(min=0)


def _check(student: Tensor, teacher: Tensor, negatives: str, tokens: Tensor | None) -> None:
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives: {negatives!r} is none of {', '.join(NEGATIVES)}")
    same = student.shape if negatives == "keep" else (*student.shape[:2], teacher.shape[-1])
    if student.ndim != 3 or teacher.shape != same or not student.shape[1]:
        raise ValueError(
            f"student patches {tuple(student.shape)} and teacher patches {tuple(teacher.shape)} are not both (c, n, d) "
            "with n >= 1: resize the teacher's features to the student's grid first"
        )
    if tokens is not None and (tokens.shape != student.shape[:2] or tokens.dtype != torch.bool):
        raise ValueError(f"tokens: found {tokens.dtype} {tuple(tokens.shape)}, needed bool {tuple(student.shape[:2])}")
