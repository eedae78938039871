"""The views of a window: which crop of it each one shows, through which intensity window, and the pixels of that.

    draw_views (host, numpy, keyed)                      render_views (the images' device)
    (seed, position, row) ─▶ ViewPlan: boxes, HU windows ─▶ int16 HU crops ─▶ resampled ─▶ windowed ─▶ normalised

Invariants: a view reads no pixel beyond its slice's true size; what a row's views are depends on (seed, position, row)
alone, never on the rows beside it. On the CPU that holds bit for bit, on other devices up to the rounding of a matrix
product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinox_model.preprocess import Preprocess, normalise, window_hu
from dinox_train.keyed import uniform
from dinox_train.resample import resample

SUBPIXEL = 1024
"""Boxes are multiples of 1/1024 pixel: sums of their numbers are exact, so that none rounds its way out of a slice."""

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How views are drawn. Raises ValueError for ranges that describe no view."""

    num_global: int = 2
    num_local: int = 8
    global_size: int = 224
    """Side of a global view, pixels."""
    local_size: int = 96
    global_scale: Range = (0.32, 1.0)
    """Area of a view's box as a fraction of the slice's, drawn uniformly."""
    local_scale: Range = (0.05, 0.32)
    aspect: Range = (0.75, 4.0 / 3.0)
    """Width of a box over its height, in pixels, drawn log-uniformly from what fits into the slice at that area."""
    level_hu: Range = (-500.0, 0.0)
    """Middle of a view's intensity window, drawn uniformly."""
    width_hu: Range = (800.0, 2000.0)
    """Width of a view's intensity window, drawn log-uniformly."""
    flip_probability: float = 0.0
    """Of a left-right flip. 0 by default: the side of an organ is anatomy."""

    def __post_init__(self) -> None:
        if self.num_global < 1 or self.num_local < 0 or min(self.global_size, self.local_size) < 1:
            raise ValueError("at least one global view, and sides of at least one pixel, are needed")
        for name in ("global_scale", "local_scale", "aspect", "level_hu", "width_hu"):
            low, high = getattr(self, name)
            if not (low <= high and (low > 0 or name == "level_hu") and (high <= 1 or "scale" not in name)):
                raise ValueError(f"{name} must be (low, high), low <= high, scales in (0, 1]; it is ({low}, {high})")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be in [0, 1], not {self.flip_probability}")

    @property
    def num_views(self) -> int:
        return self.num_global + self.num_local

    @property
    def view_sizes(self) -> np.ndarray:
        """int64 (v,): the side of each view, pixels."""
        return np.repeat([self.global_size, self.local_size], [self.num_global, self.num_local])


@dataclass(frozen=True)
class ViewPlan:
    """What the views of b windows show; v views each, the global ones first. NumPy arrays on the host."""

    boxes: np.ndarray
    """float64 (b, v, 4): y0, x0, height, width in pixels of the slice, inside its true size. Pixel i is [i, i+1]."""
    level_hu: np.ndarray
    """float64 (b, v)."""
    width_hu: np.ndarray
    """float64 (b, v)."""
    flip: np.ndarray
    """bool (b, v): mirrored left to right."""
    mm_per_pixel: np.ndarray
    """float64 (b, v, 2): size of a pixel of the view along y and x, mm: spacing x box / side."""
    num_global: int
    sizes: np.ndarray
    """int (b, 2): true size of each slice, y and x, pixels."""


def draw_views(
    settings: ViewSettings, *, seed: int, position: int, rows: np.ndarray, sizes: np.ndarray, spacing_mm: np.ndarray
) -> ViewPlan:
    """Draw the views of b windows.

    position: number of the global batch; rows: int (b,), each window's place in it; sizes: int (b, 2), the true size of
    its slices, y and x, at least 1; spacing_mm: float (b, 3), z, y, x. Pure: equal arguments give equal plans, and a
    row's views do not depend on the other rows. Box, HU window and flip are streams of their own: changing how one is
    drawn leaves the others.
    """
    scale = np.where(
        np.arange(settings.num_views)[:, None] < settings.num_global, settings.global_scale, settings.local_scale
    )
    numbers = {
        name: uniform(seed, f"views.{name}", position, rows, settings.num_views, count)
        for name, count in (("box", 4), ("window", 2), ("flip", 1))
    }
    boxes = _boxes(numbers["box"], scale, settings.aspect, np.asarray(sizes))
    level, width = settings.level_hu, settings.width_hu
    return ViewPlan(
        boxes=boxes,
        level_hu=level[0] + (level[1] - level[0]) * numbers["window"][..., 0],
        width_hu=width[0] * (width[1] / width[0]) ** numbers["window"][..., 1],
        flip=numbers["flip"][..., 0] < settings.flip_probability,
        mm_per_pixel=np.asarray(spacing_mm)[:, None, 1:] * boxes[..., 2:] / settings.view_sizes[:, None],
        num_global=settings.num_global,
        sizes=np.asarray(sizes),
    )


def _boxes(numbers: np.ndarray, scale: np.ndarray, aspect: Range, sizes: np.ndarray) -> np.ndarray:
    """float64 (b, v, 4) from uniform numbers (b, v, 4), scale (v, 2) and sizes (b, 2).

    A random resized crop without rejection: the area is exactly what is drawn, and the aspect is drawn among those that
    fit at this area (where none of the wanted does, the nearest that fits). Rejecting boxes that do not fit, as is
    usual, favours small areas.
    """
    height_limit, width_limit = sizes[:, None, 0].astype(np.float64), sizes[:, None, 1].astype(np.float64)
    area = scale[:, 0] + (scale[:, 1] - scale[:, 0]) * numbers[..., 0]
    slimmest, widest = area * width_limit / height_limit, width_limit / (height_limit * area)
    low, high = (np.clip(wanted, slimmest, widest) for wanted in aspect)
    ratio = low * (high / low) ** numbers[..., 1]
    pixels = area * height_limit * width_limit
    height = _side(np.sqrt(pixels / ratio), height_limit)
    width = _side(np.sqrt(pixels * ratio), width_limit)
    top = _subpixels(numbers[..., 2] * (height_limit - height))
    left = _subpixels(numbers[..., 3] * (width_limit - width))
    return np.stack((top, left, height, width), axis=-1)


def _side(length: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Side of a box, pixels: no longer than the slice, and never less than one pixel (that matters in tiny slices)."""
    return _subpixels(np.clip(length, 1.0, limit))


def _subpixels(length: np.ndarray) -> np.ndarray:
    return np.floor(length * SUBPIXEL) / SUBPIXEL


@torch.no_grad()
def render_views(
    images: Tensor, plan: ViewPlan, settings: ViewSettings, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """The views of `plan` as the network sees them: float32 on the images' device.

    images: int16 HU (b, k, Y, X), a slice smaller than (Y, X) in its upper left corner. Returns the global views
    (num_global*b, k, G, G) and the local ones (num_local*b, k, L, L), view-major: view 0 of all rows, then view 1 of
    all rows, and so on. A pixel averages HU, before the intensity window clamps them. mean, std: of windowed values.
    Raises TypeError for images that are not int16, ValueError for another shape.
    """
    _check_hu(images)
    kinds = (
        (settings.global_size, range(settings.num_global)),
        (settings.local_size, range(settings.num_global, settings.num_views)),
    )
    rendered = []
    for size, numbers in kinds:
        views = [_render_view(images, plan, view, size, mean, std) for view in numbers]
        rendered.append(torch.cat(views) if views else _no_views(images, size))
    return rendered[0], rendered[1]


def _render_view(images: Tensor, plan: ViewPlan, view: int, size: int, mean: float, std: float) -> Tensor:
    hu = resample(images, plan.boxes[:, view], plan.flip[:, view], plan.sizes, size)
    level_hu, width_hu = (
        torch.from_numpy(values[:, view].astype(np.float32)).to(hu.device, non_blocking=True)[:, None, None, None]
        for values in (plan.level_hu, plan.width_hu)
    )
    return normalise(window_hu(hu, level_hu, width_hu), mean, std)


def _no_views(images: Tensor, size: int) -> Tensor:
    return torch.empty((0, images.shape[1], size, size), device=images.device)


@torch.no_grad()
def render_whole_slices(images: Tensor, sizes: np.ndarray, size: int, preprocess: Preprocess) -> Tensor:
    """Each whole slice, resampled to size x size, as `preprocess` shows it: float32 (b, k, size, size).

    images: int16 HU (b, k, Y, X); sizes: int (b, 2), their true sizes. A slice that is not square is stretched, as
    views are. Raises TypeError for images that are not int16, ValueError for another shape.
    """
    _check_hu(images)
    sizes = np.asarray(sizes)
    boxes = np.concatenate((np.zeros_like(sizes), sizes), axis=1).astype(np.float64)
    hu = resample(images, boxes, np.zeros(len(boxes), bool), sizes, size)
    return normalise(window_hu(hu, preprocess.level_hu, preprocess.width_hu), preprocess.mean, preprocess.std)


def _check_hu(images: Tensor) -> None:
    """Raises TypeError or ValueError where `images` are not int16 (b, k, Y, X)."""
    if images.dtype != torch.int16:
        raise TypeError(f"images must be int16 HU, not {images.dtype}: what was scaled or windowed before is not HU")
    if images.ndim != 4:
        raise ValueError(f"images must be (b, k, Y, X), not {tuple(images.shape)}")
