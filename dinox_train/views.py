"""The pixels of views: crops of int16 HU through their intensity windows, batched on the device that holds the images.

    draw_views (host, view_plan)      render_views (the images' device)
    ViewPlan ─────────────────────▶ crop, resampled, blurred ─▶ + noise ─▶ HU window ─▶ gamma ─▶ normalised

Invariants: a view reads no pixel beyond its slice's true size; a row's pixels depend on its own plan and slice alone.
On the CPU that holds bit for bit, on other devices up to the rounding of a matrix product. Nothing waits for the
device: what it must do is decided from the plan, on the host.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dinox_model.host_to_device import to_device
from dinox_model.preprocess import Preprocess, normalise, window_hu
from dinox_train.photometric import add_noise_, apply_gamma_
from dinox_train.resample import resample
from dinox_train.view_plan import SUBPIXEL, ViewPlan, ViewSettings, draw_views

__all__ = [
    "SUBPIXEL",
    "Crop",
    "ViewPlan",
    "ViewSettings",
    "draw_views",
    "render_global_undistorted",
    "render_views",
    "render_whole_slices",
]


class Crop(Protocol):
    """Renders some views of all rows, view-major: float32 (len(views)*b, k, size, size); distorted: with the plan's
    blur, noise and gamma. The torch of this file does, or `kernels/crop.py`, equal up to the rounding of float32."""

    def __call__(
        self,
        images: Tensor,
        plan: ViewPlan,
        views: range,
        size: int,
        mean: float,
        std: float,
        *,
        distorted: bool = True,
    ) -> Tensor: ...


@torch.no_grad()
def render_views(
    images: Tensor,
    plan: ViewPlan,
    settings: ViewSettings,
    mean: float,
    std: float,
    *,
    rows_at_once: int | None = None,
    crop: Crop | None = None,
) -> tuple[Tensor, Tensor]:
    """The views of `plan` as the network sees them: float32 on the images' device.

    images: int16 HU (b, k, Y, X), a slice smaller than (Y, X) in its upper left corner. Returns the global views
    (num_global*b, k, G, G) and the local ones (num_local*b, k, L, L), view-major: view 0 of all rows, then view 1 of
    all rows, and so on. A pixel averages HU, before the intensity window clamps them. mean, std: of windowed values.
    crop: what renders them in the place of this file's torch, of which rows_at_once (see `resample`) is a matter.
    Raises TypeError for images that are not int16, ValueError for another shape.
    """
    _check_hu(images)
    render = crop or partial(_render, rows_at_once=rows_at_once)
    global_views = range(settings.num_global)
    local_views = range(settings.num_global, settings.num_views)
    return (
        render(images, plan, global_views, settings.global_size, mean, std),
        render(images, plan, local_views, settings.local_size, mean, std),
    )


@torch.no_grad()
def render_global_undistorted(
    images: Tensor,
    plan: ViewPlan,
    side: int,
    mean: float,
    std: float,
    *,
    rows_at_once: int | None = None,
    crop: Crop | None = None,
) -> Tensor:
    """The boxes of the global views at another side, float32 (num_global*b, k, side, side): for a Gram teacher.

    The same boxes, flips and HU windows as `render_views` shows, without blur, noise and gamma. Arguments, order and
    errors as there.
    """
    _check_hu(images)
    render = crop or partial(_render, rows_at_once=rows_at_once)
    return render(images, plan, range(plan.num_global), side, mean, std, distorted=False)


def _render(
    images: Tensor,
    plan: ViewPlan,
    views: range,
    size: int,
    mean: float,
    std: float,
    *,
    distorted: bool = True,
    rows_at_once: int | None = None,
) -> Tensor:
    """Some views of all rows, view-major: float32 (len(views)*b, k, size, size)."""
    batch, channels = images.shape[:2]
    step = rows_at_once or (1 if images.device.type == "cpu" else max(batch, 1))
    chosen = slice(views.start, views.stop)
    rendered = torch.empty((len(views), batch, channels, size, size), device=images.device)
    for first in range(0, batch if views else 0, step):
        rows = slice(first, first + step)
        hu = resample(
            images[rows],
            plan.boxes[rows, chosen],
            plan.flip[rows, chosen],
            plan.sizes[rows],
            size,
            blur_sigma=plan.blur_sigma[rows, chosen] if distorted else None,
            rows_at_once=step,
        )
        shown_rows = hu.shape[:2]
        hu = hu.flatten(0, 1)
        windows = np.stack((_view_major(plan.level_hu[rows, chosen]), _view_major(plan.width_hu[rows, chosen])))
        windows = to_device(windows.astype(np.float32), images.device)
        if distorted:
            add_noise_(hu, _view_major(plan.noise_hu[rows, chosen]), _view_major(plan.noise_key[rows, chosen]))
        shown = window_hu(hu, *windows[..., None, None, None])
        if distorted:
            apply_gamma_(shown, _view_major(plan.gamma[rows, chosen]))
        rendered[:, rows] = normalise(shown, mean, std).unflatten(0, shown_rows)
    return rendered.flatten(0, 1)


def _view_major(values: np.ndarray) -> np.ndarray:
    """(b, v, ...) to (v*b, ...): all rows of view 0, then all of view 1, and so on."""
    return np.ascontiguousarray(values.swapaxes(0, 1)).reshape(-1, *values.shape[2:])


@torch.no_grad()
def render_whole_slices(images: Tensor, sizes: np.ndarray, size: int, preprocess: Preprocess) -> Tensor:
    """Each whole slice, resampled to size x size, as `preprocess` shows it: float32 (b, k, size, size).

    images: int16 HU (b, k, Y, X); sizes: int (b, 2), their true sizes. A slice that is not square is stretched, as
    views are. Raises TypeError for images that are not int16, ValueError for another shape.
    """
    _check_hu(images)
    sizes = np.asarray(sizes)
    boxes = np.concatenate((np.zeros_like(sizes), sizes), axis=1).astype(np.float64)
    hu = resample(images, boxes[:, None], np.zeros((len(boxes), 1), bool), sizes, size)[0]
    return normalise(window_hu(hu, preprocess.level_hu, preprocess.width_hu), preprocess.mean, preprocess.std)


def _check_hu(images: Tensor) -> None:
    """Raises TypeError or ValueError where `images` are not int16 (b, k, Y, X)."""
    if images.dtype != torch.int16:
        raise TypeError(f"images must be int16 HU, not {images.dtype}: what was scaled or windowed before is not HU")
    if images.ndim != 4:
        raise ValueError(f"images must be (b, k, Y, X), not {tuple(images.shape)}")
