"""KoLeo: spreads the features of a batch by pushing each sample away from the one nearest to it.

Legend: b rows (images of one view), d features, G groups of g rows.

    loss = - mean over rows i of log(|| x_i - x_near(i) || + 1e-8)        x = features / || features ||

(Kozachenko-Leonenko entropy; Sablayrolles et al., arXiv 1806.03198, section 3.) It is of one view at a time, on the
backbone's CLS: among the views of an image the nearest would be the image itself, which is to stay near. The neighbour
is found without gradients, and the gradient of the distance goes to both ends.

Everything is fp32. Neighbours are looked for after the mean is taken away, which changes no distance: the cosine of two
rows that are 0.001 apart differs from 1 by less than fp32 can hold, and the nearest row would be drawn by rounding.
Rows that fp32 cannot tell apart (nearer than 1e-6) count with the logarithm of their distance, finite even at 0, and
with no gradient: its direction would be rounding, its length up to 1e8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinox_train.objectives.numerics import directions, full_precision, without_autocast

_EPSILON = 1e-8
_SAME = 1e-6
"""Distance of directions below which fp32 says nothing about them: some ten roundings."""


def koleo_loss(features: Tensor, *, group_size: int | None = None, total_rows: int | None = None) -> Tensor:
    """The loss of one view, a 0-dim tensor: fp32 (fp64 for fp64 features), with gradients to `features`.

    features: (b, d), b >= 2. group_size: neighbours are looked for among so many rows that follow each other; None:
    among all b. Where the groups lie within micro-batches, and total_rows is the number of images of the whole update,
    the losses of the micro-batches, and their gradients, add up to the update's; with larger groups see
    `koleo_gradient`. Raises ValueError for a row without any other in its group, or rows that are no whole number of
    groups.
    """
    rows = group_size or len(features)
    _check(features, rows)
    with without_autocast(features):
        x_GRD = directions(full_precision(features)).unflatten(0, (-1, rows))
        near_GRD = x_GRD.gather(1, _nearest(x_GRD.detach())[..., None].expand_as(x_GRD))
        squares_GR = (x_GRD - near_GRD).square().sum(dim=2)
        apart = squares_GR > _SAME**2
        # A root has no finite gradient at 0, not even where another value is taken instead: it must not see the 0.
        distances_GR = torch.where(apart, squares_GR, torch.ones_like(squares_GR)).sqrt()
        distances_GR = torch.where(apart, distances_GR, squares_GR.detach().sqrt())
        return -(distances_GR + _EPSILON).log().sum() / (total_rows or len(features))


def koleo_gradient(features: Tensor, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The loss of one view of a whole update and its gradient (b, d) by the features: fp32, both without gradients.

    features: (b, d) of all images of the update (over all micro-batches and ranks), computed without gradients. Then
    `(x * gradient[rows]).sum()`, with x the features of `rows` computed once more with gradients, has the gradient that
    the loss of the whole update has: also by rows that are the neighbours of others. Its value means nothing.
    """
    with torch.enable_grad():
        leaf = full_precision(features).detach().requires_grad_()
        loss = koleo_loss(leaf, group_size=group_size)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _nearest(x_GRD: Tensor) -> Tensor:
    """int64 (G, g): the row nearest to each row of its group, itself left out.

    The nearest has the largest <y_i, y_j> - |y_j|^2 / 2, for y = x less anything that all rows share.
    """
    y_GRD = x_GRD - x_GRD.mean(dim=1, keepdim=True)
    scores_GRR = y_GRD @ y_GRD.transpose(1, 2) - y_GRD.square().sum(dim=2)[:, None] / 2
    scores_GRR.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return scores_GRR.argmax(dim=2)


def _check(features: Tensor, rows: int) -> None:
    if features.ndim != 2:
        raise ValueError(f"features: found shape {tuple(features.shape)}, needed (b, d)")
    if rows < 2:
        raise ValueError(f"KoLeo needs at least two images to compare, not {rows}: raise the batch or group size")
    if len(features) % rows:
        raise ValueError(f"{len(features)} rows are no whole number of groups of {rows}: choose a group size that fits")
