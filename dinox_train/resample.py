"""Boxes of slices, resampled to squares with an antialiasing triangle filter, as two matrix products.

    crop (k, h, w) ─▶ crop @ W_x (w, size) ─▶ W_y (size, h) @ … ─▶ (k, size, size)

A row of W holds one output pixel's weights of the input pixels along an axis. The triangle reaches one output pixel to
either side where the box shrinks, and one input pixel where it grows (bilinear): for boxes of whole pixels this is
`torch.nn.functional.interpolate(crop, mode="bilinear", antialias=True)`.

Invariant: pixels that a box does not touch have no weight, so that no value beyond a slice's true size is read into a
view.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CROP_MULTIPLE = 32
"""Shared crops have sides of such multiples, so that few different shapes meet the device's allocator and GEMMs."""


def resample(
    images: Tensor,
    boxes: np.ndarray,
    flip: np.ndarray,
    sizes: np.ndarray,
    size: int,
    *,
    rows_at_once: int | None = None,
) -> Tensor:
    """Resample a box of each image to size x size: float32 (b, k, size, size) on the images' device, in their unit.

    images: int16 (b, k, Y, X); boxes: float64 (b, 4), y0, x0, height, width in pixels, inside `sizes`, int (b, 2);
    flip: bool (b,), mirror left to right. rows_at_once: how many images share a matrix product. None: one on the CPU,
    where each then has the smallest crop and a result that no other row can change; all of them elsewhere.
    """
    rows = rows_at_once or (1 if images.device.type == "cpu" else len(images))
    parts = [slice(start, start + rows) for start in range(0, len(images), rows)]
    # HU need more than the 8 or 11 bits of a bf16 or fp16 product.
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat(
            [_resample_together(images[part], boxes[part], flip[part], sizes[part], size) for part in parts]
        )


def _resample_together(images: Tensor, boxes: np.ndarray, flip: np.ndarray, sizes: np.ndarray, size: int) -> Tensor:
    """`resample` of images that share a matrix product."""
    low = np.floor(boxes[:, :2]).astype(np.int64)
    high = np.minimum(np.ceil(boxes[:, :2] + boxes[:, 2:]).astype(np.int64), sizes)
    limits = np.array(images.shape[2:])
    extent = (high - low).max(axis=0)
    if len(images) > 1:
        extent = np.minimum(-(-extent // CROP_MULTIPLE) * CROP_MULTIPLE, limits)
    corner = np.minimum(low, limits - extent)
    start, length = boxes[:, :2] - corner, boxes[:, 2:].copy()
    # A box of negative width, begun at its right edge, is the mirrored one.
    start[:, 1] += np.where(flip, length[:, 1], 0.0)
    length[:, 1] *= np.where(flip, -1.0, 1.0)
    crops = _cut(images, corner, extent).float()
    geometry = np.stack((start, length, low - corner, high - corner))
    along_y, along_x = _axis_weights(geometry, size, extent, images.device)
    narrow = crops.flatten(1, 2) @ along_x.transpose(1, 2)  # all channels of an image in one product
    return along_y[:, None] @ narrow.unflatten(1, crops.shape[1:3])


def _cut(images: Tensor, corner: np.ndarray, extent: np.ndarray) -> Tensor:
    """A crop (b, k, *extent) of each image from its own corner (b, 2)."""
    height, width = (int(side) for side in extent)
    if len(images) == 1:
        top, left = (int(edge) for edge in corner[0])
        return images[:, :, top : top + height, left : left + width]
    if (height, width) == tuple(images.shape[2:]):
        return images
    corners = torch.from_numpy(corner).to(images.device, non_blocking=True)
    rows = corners[:, 0, None] + torch.arange(height, device=images.device)
    columns = corners[:, 1, None] + torch.arange(width, device=images.device)
    which = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[which, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _axis_weights(geometry: np.ndarray, size: int, extent: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights along y, float32 (b, size, height), and along x, (b, size, width). Each row sums to 1.

    geometry: float64 (4, b, 2): start and length of the box (negative: mirrored), first touched pixel and the one after
    the last, all relative to the crop, along y and x.
    """
    numbers = torch.from_numpy(geometry.astype(np.float32)).to(device, non_blocking=True)
    steps = torch.arange(size, device=device) + 0.5
    weights = []
    for axis in range(2):
        start, length, first, end = numbers[:, :, axis, None]
        scale = length / size
        per_support = 1.0 / scale.abs().clamp(min=1.0)
        centres = torch.arange(int(extent[axis]), device=device) + 0.5
        touched = (centres > first) & (centres < end)
        pixels = torch.where(touched, centres * per_support, torch.inf)  # an infinite distance has no weight
        distance = (pixels[:, None, :] - ((start + steps * scale) * per_support)[:, :, None]).abs_()
        triangle = distance.neg_().add_(1.0).clamp_(min=0.0)
        weights.append(triangle.div_(triangle.sum(dim=2, keepdim=True)))
    return weights[0], weights[1]
