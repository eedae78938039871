"""The loss of a masked autoencoder: the pixels of the patches that the network did not see.

    loss = mean over masked patches, mean over a patch's pixels, of (predicted - pixel)^2

(He et al., MAE, arXiv 2111.06377, section 3.) With `normalised_patches` as targets a patch is predicted less its own
mean and over its own standard deviation: its structure, not its level.
"""

from __future__ import annotations

from torch import Tensor

from dinox_train.objectives.numerics import full_precision

_EPSILON = 1e-6
"""Added to a patch's variance: a patch of one value (air, below its window) becomes zeros."""


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """Images (b, c, y, x) as their patches (b, n, c * patch_size^2), row by row as the network numbers them.

    Within a patch: channel, then row, then column. Raises ValueError where patches do not tile the images.
    """
    if images.ndim != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(f"images {tuple(images.shape)} are not (b, c, y, x) of whole patches of {patch_size}")
    cut = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # b, c, h, p, w, p
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def normalised_patches(patches: Tensor) -> Tensor:
    """Each patch (…, pixels) less its mean, divided by the root of its (population) variance + 1e-6; fp32."""
    pixels = full_precision(patches)
    centred = pixels - pixels.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + _EPSILON).sqrt()


def mae_loss(predicted: Tensor, targets: Tensor, *, total_patches: int) -> Tensor:
    """The loss, a 0-dim tensor: fp32 (fp64 for fp64 predictions), with gradients to `predicted`.

    predicted, targets: (m, pixels) of the masked patches; m may be 0. total_patches: masked patches of the whole
    update; the losses of its micro-batches, and their gradients, then add up to the update's. Raises ValueError for
    shapes that do not fit.
    """
    if predicted.ndim != 2 or predicted.shape != targets.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} and targets {tuple(targets.shape)} are not (m, pixels)")
    if total_patches < 1:
        raise ValueError(f"total_patches must be at least 1, not {total_patches}")
    pixels = full_precision(predicted)
    return (pixels - targets.detach().to(pixels.dtype)).square().mean(dim=1).sum() / total_patches
