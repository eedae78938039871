"""Boxes of slices, resampled to squares with an antialiasing triangle filter, as two matrix products.

    crop (k, h, w) ─▶ crop @ W_x (w, size) ─▶ W_y (size, h) @ … ─▶ (k, size, size)

A row of W holds one output pixel's weights of the input pixels along an axis. The triangle reaches one output pixel to
either side where the box shrinks, and one input pixel where it grows (bilinear): for boxes of whole pixels this is
`torch.nn.functional.interpolate(crop, mode="bilinear", antialias=True)`. A Gaussian blur of the result is linear too:
its weights are multiplied into W, which is cheaper than another pass over the pixels.

W is a band. Where an image has a product of its own (on the CPU), W is cut into blocks of BLOCK output pixels, and each
is multiplied with the input pixels that it sees alone: 5 times less arithmetic for a crop of 400 pixels.

Invariant: pixels that a box does not touch have no weight, so that no value beyond a slice's true size is read into a
view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinox_model.host_to_device import to_device

CROP_MULTIPLE = 32
"""Shared crops have sides of such multiples, so that few different shapes meet the device's allocator and GEMMs."""
BLOCK = 32
"""Output pixels of a block: fewer make products too small to be fast, more multiply more zeros."""
BLUR_REACH = 4.0
"""A blur's weights end at this many standard deviations: 1 / 16,000 of its weight lies beyond."""
_NO_BLUR = 1e-3
"""A standard deviation at which a Gaussian's weight of the next pixel is 0 in float32."""


def resample(
    images: Tensor,
    boxes: np.ndarray,
    flip: np.ndarray,
    sizes: np.ndarray,
    size: int,
    *,
    blur_sigma: np.ndarray | None = None,
    rows_at_once: int | None = None,
) -> Tensor:
    """Resample n boxes of each image to size x size: float32 (n, b, k, size, size) on their device, in their unit.

    images: int16 (b, k, Y, X); boxes: float64 (b, n, 4), y0, x0, height, width in pixels, inside `sizes`, int (b, 2);
    flip: bool (b, n), mirror left to right; blur_sigma: float64 (b, n), standard deviation of a Gaussian blur of the
    result, in its pixels, 0 for none (None: of no box). At the edges the result is continued as its mirror image.
    rows_at_once: how many images share a matrix product. None: one on the CPU, where each then has the smallest crops
    and a result that no other row can change; all of them elsewhere.
    """
    batch, num_boxes = flip.shape
    sigma = np.zeros((batch, num_boxes)) if blur_sigma is None else blur_sigma
    step = rows_at_once or (1 if images.device.type == "cpu" else max(batch, 1))
    results = torch.empty((num_boxes, batch, images.shape[1], size, size), device=images.device)
    # HU need more than the 8 or 11 bits of a bf16 or fp16 product.
    with torch.autocast(images.device.type, enabled=False):
        for first in range(0, batch, step):
            rows = slice(first, first + step)
            if step == 1:
                crops = _Crops.of(boxes[first], flip[first], sizes[[first] * num_boxes], sigma[first])
                _resample_one_by_one(images[first], crops, size, results[:, first])
                continue
            for number in range(num_boxes):
                crops = _Crops.of(boxes[rows, number], flip[rows, number], sizes[rows], sigma[rows, number])
                results[number, rows] = _resample_together(images[rows], crops, size)
    return results


@dataclass(frozen=True)
class _Crops:
    """Boxes of m crops, along y and x: the pixels that they touch, int64 (2, m), and where results lie in the slice."""

    low: np.ndarray
    high: np.ndarray
    """The pixel after the last."""
    start: np.ndarray
    """float64 (2, m): edge of the first result, pixels of the slice."""
    length: np.ndarray
    """float64 (2, m): of all results; negative: mirrored, begun at the far edge."""
    sigma: np.ndarray
    """float64 (m,)."""

    @classmethod
    def of(cls, boxes: np.ndarray, flip: np.ndarray, sizes: np.ndarray, sigma: np.ndarray) -> _Crops:
        low = np.floor(boxes[:, :2]).astype(np.int64)
        high = np.minimum(np.ceil(boxes[:, :2] + boxes[:, 2:]).astype(np.int64), sizes)
        start, length = boxes[:, :2].copy(), boxes[:, 2:].copy()
        # A box of negative width, begun at its right edge, is the mirrored one.
        start[:, 1] += np.where(flip, length[:, 1], 0.0)
        length[:, 1] *= np.where(flip, -1.0, 1.0)
        return cls(low.T, high.T, start.T, length.T, sigma)

    @property
    def reach(self) -> int:
        """Results that the widest blur reaches to either side; 0: there is none."""
        return int(np.ceil(BLUR_REACH * self.sigma.max()))


def _resample_together(images: Tensor, crops: _Crops, size: int) -> Tensor:
    """A crop of each image, all in the same two products: float32 (b, k, size, size)."""
    limits = np.array(images.shape[2:])
    extent = (crops.high - crops.low).max(axis=1)
    extent = np.minimum(-(-extent // CROP_MULTIPLE) * CROP_MULTIPLE, limits)
    corner = np.minimum(crops.low, (limits - extent)[:, None])
    pixels = _cut(images, corner.T, extent).float()
    outputs = np.arange(size)[None]
    weights = _weights(crops, size, outputs, corner[:, :, None], int(extent.max()), images.device)
    along_y, along_x = (weights[axis, :, 0, :, : int(extent[axis])] for axis in range(2))
    narrow = pixels.flatten(1, 2) @ along_x.transpose(1, 2)  # all channels of an image in one product
    return along_y[:, None] @ narrow.unflatten(1, pixels.shape[1:3])


def _resample_one_by_one(image: Tensor, crops: _Crops, size: int, results: Tensor) -> None:
    """Crops of one image (k, Y, X) into `results` (m, k, size, size), block by block of results."""
    outputs = np.arange(-(-size // BLOCK) * BLOCK).reshape(-1, BLOCK)
    begin, broad = _bands(crops, size, outputs)
    weights = _weights(crops, size, outputs, begin, broad, image.device)
    along_y, along_x = ([one.unbind() for one in axis.unbind()] for axis in weights.unbind())
    parts = [(block, min(block + BLOCK, size)) for block in range(0, size, BLOCK)]
    channels, tallest = len(image), int((crops.high - crops.low)[0].max())
    pixels = image.float()
    scratch = pixels.new_empty(channels, tallest, size)
    for number, result in enumerate(results):
        (top, left), (bottom, right) = crops.low[:, number].tolist(), crops.high[:, number].tolist()
        narrow, seen = scratch[:, : bottom - top], min(broad, right - left)
        for (low, high), along, edge in zip(parts, along_x[number], begin[1, number].tolist(), strict=True):
            band = along[: high - low, :seen].t().expand(channels, -1, -1)
            torch.bmm(pixels[:, top:bottom, edge : edge + seen], band, out=narrow[:, :, low:high])
        seen = min(broad, bottom - top)
        for (low, high), along, edge in zip(parts, along_y[number], (begin[0, number] - top).tolist(), strict=True):
            band = along[: high - low, :seen].expand(channels, -1, -1)
            torch.bmm(band, narrow[:, edge : edge + seen], out=result[:, low:high])


def _bands(crops: _Crops, size: int, outputs: np.ndarray) -> tuple[np.ndarray, int]:
    """First pixel of the band that each block of `outputs` (blocks, n) sees, int64 (2, m, blocks), and the width of the
    broadest one. A band that is broader than its crop begins with it."""
    scale = crops.length / size
    ends = np.stack((np.maximum(outputs[:, 0] - crops.reach, 0), np.minimum(outputs[:, -1] + crops.reach, size - 1)))
    centres = crops.start[..., None, None] + (ends + 0.5) * scale[..., None, None]  # (2, m, both ends, blocks)
    support = np.maximum(np.abs(scale), 1.0)[..., None] + 1.0  # a pixel more than needed: centres are rounded
    low, high = crops.low[..., None], crops.high[..., None]
    begin = np.clip(np.floor(centres.min(axis=2) - support), low, high)
    end = np.clip(np.ceil(centres.max(axis=2) + support), low, high)
    broad = int((end - begin).max())
    return np.maximum(np.minimum(begin, high - broad), low).astype(np.int64), broad


def _cut(images: Tensor, corner: np.ndarray, extent: np.ndarray) -> Tensor:
    """A crop (b, k, *extent) of each image from its own corner (b, 2)."""
    height, width = (int(side) for side in extent)
    if len(images) == 1:
        top, left = (int(edge) for edge in corner[0])
        return images[:, :, top : top + height, left : left + width]
    if (height, width) == tuple(images.shape[2:]):
        return images
    corners = to_device(corner, images.device)
    rows = corners[:, 0, None] + torch.arange(height, device=images.device)
    columns = corners[:, 1, None] + torch.arange(width, device=images.device)
    which = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[which, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _weights(
    crops: _Crops, size: int, outputs: np.ndarray, begin: np.ndarray, broad: int, device: torch.device
) -> Tensor:
    """float32 (2, m, blocks, n, broad): weights of the `broad` pixels from `begin` on, along y and x; rows sum to 1.

    outputs: int (blocks, n), results, one after the other in a block (those from `size` on belong to nothing); begin:
    int64, broadcasts with (2, m, blocks).
    """
    count, reach = outputs.shape[1], crops.reach
    around = outputs[:, :1] + np.arange(-reach, count + reach)
    around %= 2 * size  # the mirrored continuation beyond both edges
    around = np.minimum(around, 2 * size - 1 - around)
    middles = to_device((around + 0.5).astype(np.float32), device)[:, :, None]
    scale = (crops.length / size)[..., None]
    # Everything from the first pixel of the band on: small numbers, which float32 holds exactly enough.
    fields = (crops.start[..., None] - begin, scale, crops.low[..., None] - begin, crops.high[..., None] - begin)
    geometry = np.stack(np.broadcast_arrays(*fields)).astype(np.float32)
    numbers = to_device(geometry, device)[..., None, None]
    start, step, first, end = numbers  # each (2, m, blocks, 1, 1)
    per_support = 1.0 / step.abs().clamp(min=1.0)
    centres = torch.arange(broad, device=device) + 0.5
    touched = (centres > first) & (centres < end)
    pixels = torch.where(touched, centres * per_support, torch.inf)  # an infinite distance has no weight
    triangle = pixels - (start + middles * step) * per_support
    triangle.abs_().neg_().add_(1.0).clamp_(min=0.0)
    # Rows that fill up the last block may see nothing; 0 / 0 would spread from them in the blur's product.
    triangle.div_(triangle.sum(dim=-1, keepdim=True).clamp_(min=1e-9))
    return triangle if reach == 0 else _gaussian(crops.sigma, count, reach, device)[:, None] @ triangle


def _gaussian(sigma: np.ndarray, count: int, reach: int, device: torch.device) -> Tensor:
    """float32 (b, n, n + 2 reach): row i holds a Gaussian's weights of the pixels i - reach to i + reach, sum 1."""
    numbers = np.stack((np.maximum(sigma, _NO_BLUR), np.ceil(BLUR_REACH * sigma))).astype(np.float32)
    deviation, end = to_device(numbers, device)[:, :, None, None]
    pixels = torch.arange(-reach, count + reach, device=device) - torch.arange(count, device=device)[:, None]
    weights = torch.exp(-0.5 * (pixels / deviation).square()) * (pixels.abs() <= end)
    return weights.div_(weights.sum(dim=-1, keepdim=True))
