"""Views of CT windows as contenders: ours, and the pipeline of PIL calls that torchvision's transforms amount to.

Each makes 2 global and 8 local views of the same windows from the same plan: crop, resize with antialiasing, blur, HU
window, floats. Boxes are whole pixels, since PIL crops no others. The PIL pipeline works on 8 bits, as one on PNG files
does, either through each view's own HU window, or through one window for all views, which saves it that work.

Invariant: the gray that a PIL pipeline makes is compared with ours before it is timed; what 8 bits and PIL's blur of
three box filters may differ is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from timing import Prepared, Setup

from dinox_train.views import ViewPlan, ViewSettings, draw_views, render_views

MEAN, STD = 0.4, 0.3
MOST_GRAY = 0.015
"""Mean difference, of 1, that a PIL pipeline's views may have from ours."""
ONE_WINDOW = (-250.0, 1500.0)
EVERYTHING = ViewSettings(noise_probability=0.5, gamma_probability=0.5, flip_probability=0.5)
Views = tuple[np.ndarray, np.ndarray]


class Pipelines:
    """The contenders on windows int16 (b, k, Y, X), all of that size. Work: images, each with all its views."""

    def __init__(self, windows: np.ndarray) -> None:
        self.windows, self.settings = windows, ViewSettings()
        self.images = torch.from_numpy(windows)
        self.sizes = np.tile(windows.shape[2:], (len(windows), 1))
        self.position = 0

    def plan(self, settings: ViewSettings, position: int) -> ViewPlan:
        """Boxes of whole pixels, as PIL needs them."""
        rows, spacing = np.arange(len(self.windows)), np.ones((len(self.windows), 3))
        plan = draw_views(settings, seed=0, position=position, rows=rows, sizes=self.sizes, spacing_mm=spacing)
        low = np.floor(plan.boxes[..., :2])
        high = np.minimum(np.ceil(plan.boxes[..., :2] + plan.boxes[..., 2:]), self.sizes[:, None])
        return replace(plan, boxes=np.concatenate((low, high - low), axis=-1))

    def ours(self, settings: ViewSettings, device: str = "cpu", *, wait: bool = True) -> Setup:
        """Draw and render on a device; with `wait` until that is done, else as long as the host is busy with it."""

        def setup() -> Prepared:
            images = self.images.pin_memory() if device == "cuda" else self.images

            def run() -> float:
                self.position += 1
                plan = self.plan(settings, self.position)
                render_views(images.to(device, non_blocking=True), plan, settings, MEAN, STD)
                if wait and device == "cuda":
                    torch.cuda.synchronize()
                return len(self.windows)

            idle = torch.cuda.synchronize if device == "cuda" else None
            return Prepared(run, {"device": device, "threads": torch.get_num_threads()}, idle)

        return setup

    def pil(self, render: Callable[[ViewPlan], Views], window: tuple[float, float] | None) -> Setup:
        """`render` on new plans; compared with ours on one first. `window`: the one (level, width) that it shows."""

        def setup() -> Prepared:
            plan = self.plan(self.settings, 0)
            if window is not None:
                level, width = (np.full_like(plan.level_hu, number) for number in window)
                plan = replace(plan, level_hu=level, width_hu=width)
            expected = render_views(self.images, plan, self.settings, MEAN, STD)
            pairs = zip(render(plan), expected, strict=True)
            difference = max(float(np.abs(found - ours.numpy()).mean()) * STD for found, ours in pairs)
            if difference > MOST_GRAY:
                raise ValueError(f"the PIL pipeline shows other views: they differ by {difference:.3f} on average")

            def run() -> float:
                self.position += 1
                render(self.plan(self.settings, self.position))
                return len(self.windows)

            return Prepared(run, {"mean_difference_of_gray": difference})

        return setup

    def pil_own_windows(self, plan: ViewPlan) -> Views:
        """Each view's crop is windowed to 8 bits, then resized."""

        def crop(row: int, view: int, box: tuple[int, int, int, int]) -> Image.Image:
            left, top, right, bottom = box
            hu = self.windows[row, :, top:bottom, left:right]
            return to_picture(hu, plan.level_hu[row, view], plan.width_hu[row, view])

        return self._pil_views(plan, crop)

    def pil_one_window(self, plan: ViewPlan) -> Views:
        """Each window becomes one picture of 8 bits, of which views are cropped."""
        pictures = [to_picture(hu, *ONE_WINDOW) for hu in self.windows]
        return self._pil_views(plan, lambda row, view, box: pictures[row].crop(box))

    def _pil_views(self, plan: ViewPlan, crop: Callable[[int, int, tuple[int, int, int, int]], Image.Image]) -> Views:
        kinds: list[list[np.ndarray]] = [[], []]
        for view, side in enumerate(self.settings.view_sizes.tolist()):
            for row in range(len(self.windows)):
                top, left, height, width = (int(number) for number in plan.boxes[row, view])
                picture = crop(row, view, (left, top, left + width, top + height))
                picture = picture.resize((side, side), Image.Resampling.BILINEAR)
                if plan.blur_sigma[row, view] > 0:
                    picture = picture.filter(ImageFilter.GaussianBlur(float(plan.blur_sigma[row, view])))
                gray = np.asarray(picture).transpose(2, 0, 1).astype(np.float32)
                gray *= np.float32(1 / 255)
                gray -= np.float32(MEAN)
                gray /= np.float32(STD)
                kinds[view >= plan.num_global].append(gray)
        return np.stack(kinds[0]), np.stack(kinds[1])

    def bytes_of(self) -> dict[str, float]:
        """Bytes an image on the way to the device: as a window of int16, and as views of float32."""
        channels, sides = self.windows.shape[1], self.settings.view_sizes
        return {
            "int16 window": float(self.windows[0].nbytes),
            "float32 views": float(4 * channels * (sides * sides).sum()),
        }


def to_picture(hu: np.ndarray, level_hu: float, width_hu: float) -> Image.Image:
    """int16 HU (3, y, x) through a window as a picture of 8 bits and three channels."""
    scaled = (hu - np.float32(level_hu - width_hu / 2)) * np.float32(255 / width_hu)
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def windows_of(volumes: list[np.ndarray], count: int) -> np.ndarray:
    """int16 (count, 3, y, x): windows of three slices, in turn from volumes (z, y, x) with one slice or more."""
    found: list[Any] = []
    for turn in range(count):
        hu = volumes[turn % len(volumes)]
        middle = (turn // len(volumes)) % len(hu)
        found.append(hu[np.clip([middle - 1, middle, middle + 1], 0, len(hu) - 1)])
    return np.ascontiguousarray(np.stack(found), np.int16)
