"""A page of views: each window's slice with the boxes of its views in it, and beside it what the network is shown.

Invariant: pixels are those that `render_views` gives, undistorted by the page: one pixel of a view is one of the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dinox_train.views import ViewPlan, ViewSettings, draw_views, render_views
from preview.page import BLUE, FAINT, INK, ORANGE, Page
from preview.tiles import WIDE, fitted, gray, resized

MARGIN, GAP, HEAD, CAPTION, LOCAL_PITCH = 16, 10, 54, 46, 24
BLUE_RGB, ORANGE_RGB = (0x6F, 0xA8, 0xDC), (0xE6, 0x9F, 0x5B)


@dataclass(frozen=True)
class Window:
    """What a row of the page is about: int16 HU (k, y, x), its spacing (z, y, x) in mm, and a line that says which."""

    hu: np.ndarray
    spacing_mm: tuple[float, float, float]
    label: str


def draw_views_page(windows: Sequence[Window], settings: ViewSettings, *, seed: int, position: int) -> Page:
    """The views of `windows` as update `position` + 1 of a run with this seed would see them in these rows."""
    sizes = np.array([window.hu.shape[1:] for window in windows])
    images = np.full((len(windows), len(windows[0].hu), *sizes.max(axis=0)), -1024, np.int16)
    for image, window in zip(images, windows, strict=True):
        image[:, : window.hu.shape[1], : window.hu.shape[2]] = window.hu
    plan = draw_views(
        settings,
        seed=seed,
        position=position,
        rows=np.arange(len(windows)),
        sizes=sizes,
        spacing_mm=np.array([window.spacing_mm for window in windows]),
    )
    rendered = render_views(torch.from_numpy(images), plan, settings, 0.0, 1.0)
    views = [[one[row :: len(windows), one.shape[1] // 2] for one in rendered] for row in range(len(windows))]
    layout = _Layout(settings)
    page = Page(layout.width, HEAD + len(windows) * layout.row_height + MARGIN)
    page.text(MARGIN, 10, "views: boxes in the slice (blue global, orange local), and what the network sees", bold=True)
    page.text(
        MARGIN, 30, "below each: its HU window (level / width), mm of one of its pixels, and blur, noise, gamma",
        color=FAINT, size=8,
    )  # fmt: skip
    for row, (window, (global_views, local_views)) in enumerate(zip(windows, views, strict=True)):
        top = HEAD + row * layout.row_height
        _slice(page, layout, top, window, plan, row)
        for view, pixels in enumerate([*global_views, *local_views]):
            left, y = layout.place(view)
            shown = (pixels.clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()
            page.picture(left, top + y, shown)
            _caption(page, left, top + y + len(shown) + 2, plan, row, view)
    return page


class _Layout:
    """Where tiles stand: the slice, the global views beside it, the local ones in rows beside those."""

    def __init__(self, settings: ViewSettings) -> None:
        self.settings = settings
        self.side = settings.global_size
        self.local_rows = max(1, (self.side + CAPTION) // (settings.local_size + CAPTION - 14))
        self.local_pitch = settings.local_size + LOCAL_PITCH
        columns = -(-settings.num_local // self.local_rows)
        self.locals_left = MARGIN + (1 + settings.num_global) * (self.side + GAP)
        self.width = self.locals_left + columns * self.local_pitch + MARGIN
        self.row_height = max(self.side + CAPTION, self.local_rows * (settings.local_size + CAPTION))

    def place(self, view: int) -> tuple[int, int]:
        """Left, and y below the row's top, of a view's tile."""
        if view < self.settings.num_global:
            return MARGIN + (1 + view) * (self.side + GAP), 0
        column, row = divmod(view - self.settings.num_global, self.local_rows)
        return self.locals_left + column * self.local_pitch, row * (self.settings.local_size + CAPTION)


def _slice(page: Page, layout: _Layout, top: int, window: Window, plan: ViewPlan, row: int) -> None:
    hu = window.hu[len(window.hu) // 2]
    height_mm, width_mm = (hu.shape[axis] * window.spacing_mm[1 + axis] for axis in (0, 1))
    size = fitted((height_mm, width_mm), (layout.side, layout.side))
    pixels = np.repeat(gray(resized(hu, size), WIDE)[:, :, None], 3, axis=2)
    scale = np.array(size) / hu.shape
    for view in reversed(range(plan.boxes.shape[1])):
        box = plan.boxes[row, view]
        low, high = box[:2] * scale, (box[:2] + box[2:]) * scale
        outline(pixels, low, high, BLUE_RGB if view < plan.num_global else ORANGE_RGB)
    page.picture(MARGIN, top, pixels)
    page.text(MARGIN, top + size[0] + 4, window.label, size=8, color=INK)
    text = f"{hu.shape[1]} x {hu.shape[0]} pixels, {window.spacing_mm[2]:.2f} x {window.spacing_mm[1]:.2f} mm"
    page.text(MARGIN, top + size[0] + 20, text, size=7, color=FAINT)


def outline(pixels: np.ndarray, low: np.ndarray, high: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw a rectangle from `low` (y, x) to `high`, in pixels, into a picture (rows, columns, 3), in place."""
    (top, left), (bottom, right) = np.floor(low).astype(int), np.ceil(high).astype(int) - 1
    bottom, right = min(bottom, pixels.shape[0] - 1), min(right, pixels.shape[1] - 1)
    pixels[[top, bottom], left : right + 1] = colour
    pixels[top : bottom + 1, [left, right]] = colour


def _caption(page: Page, left: int, top: int, plan: ViewPlan, row: int, view: int) -> None:
    window, done = plan.describe(row, view)
    mm_y, mm_x = plan.mm_per_pixel[row, view]
    page.text(left, top, window, size=6.5, color=BLUE if view < plan.num_global else ORANGE)
    page.text(left, top + 12, f"{mm_x:.2f} x {mm_y:.2f} mm", size=6.5, color=FAINT)
    page.text(left, top + 24, done, size=6.5, color=FAINT)
