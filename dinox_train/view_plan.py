"""What the views of a window show, drawn on the host: crop, HU window, flip, blur, noise, gamma. numpy only.

    (seed, position, row, view) ─▶ uniform numbers, a stream for each purpose ─▶ ViewPlan

Invariants: a box never leaves its slice's true size; what a row's views are depends on (seed, position, row) alone,
never on the rows beside it; each purpose has a stream of its own, so that switching one leaves the others' numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dinox_train.hu_windows import FREE, PRESET_NAMES, HuPolicy, Range
from dinox_train.keyed import uniform

SUBPIXEL = 1024
"""Boxes are multiples of 1/1024 pixel: sums of their numbers are exact, so that none rounds its way out of a slice."""


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How views are drawn. Raises ValueError for values that describe no view."""

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
    window_presets: Mapping[str, float] | None = None
    """Presets (`hu_windows.HU_WINDOWS`) and their weights, in the place of the free range of the two before; or None.
    """
    preset_jitter: float = 0.1
    """Around a preset: the level moves by up to this share of its width, the width by up to this factor more or less.
    """
    flip_probability: float = 0.0
    """Of a left-right flip. 0 by default: the side of an organ is anatomy."""
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Of a Gaussian blur: of the first global view, of the other global ones, of the local ones."""
    blur_sigma: Range = (0.1, 2.0)
    """Its standard deviation, pixels of the view, drawn uniformly."""
    noise_probability: float = 0.0
    """Of white Gaussian noise on the view's HU."""
    noise_hu: Range = (5.0, 30.0)
    """Its standard deviation, HU, drawn uniformly."""
    gamma_probability: float = 0.0
    """Of a gamma curve on the windowed view."""
    gamma: Range = (0.8, 1.25)
    """Its exponent, drawn log-uniformly."""

    def __post_init__(self) -> None:
        if self.num_global < 1 or self.num_local < 0 or min(self.global_size, self.local_size) < 1:
            raise ValueError("at least one global view, and sides of at least one pixel, are needed")
        ranges = ("global_scale", "local_scale", "aspect", "level_hu", "width_hu", "blur_sigma", "noise_hu", "gamma")
        for name in ranges:
            low, high = getattr(self, name)
            if not (low <= high and (low > 0 or name == "level_hu") and (high <= 1 or "scale" not in name)):
                rule = "scales in (0, 1], " if "scale" in name else "" if name == "level_hu" else "above 0, "
                raise ValueError(f"{name} must be [low, high], {rule}low <= high, not [{low}, {high}]")
        for name in ("flip_probability", "blur_probability", "noise_probability", "gamma_probability"):
            given = getattr(self, name)
            if not all(0 <= one <= 1 for one in np.atleast_1d(given)):
                raise ValueError(f"{name} must be in [0, 1], not {given}")
        if len(self.blur_probability) != 3:
            raise ValueError("blur_probability must be three numbers: first global view, other global ones, local ones")
        _ = self.hu_policy  # raises ValueError for an unknown preset

    @property
    def num_views(self) -> int:
        return self.num_global + self.num_local

    @property
    def view_sizes(self) -> np.ndarray:
        """int64 (v,): the side of each view, pixels."""
        return np.repeat([self.global_size, self.local_size], [self.num_global, self.num_local])

    @property
    def hu_policy(self) -> HuPolicy:
        """How windows are drawn."""
        return HuPolicy(self.level_hu, self.width_hu, self.window_presets, self.preset_jitter)


@dataclass(frozen=True)
class ViewPlan:
    """What the views of b windows show; v views each, the global ones first. NumPy arrays on the host."""

    boxes: np.ndarray
    """float64 (b, v, 4): y0, x0, height, width in pixels of the slice, inside its true size. Pixel i is [i, i+1]."""
    level_hu: np.ndarray
    """float64 (b, v)."""
    width_hu: np.ndarray
    """float64 (b, v)."""
    preset: np.ndarray
    """int64 (b, v): number of the window's preset in `hu_windows.PRESET_NAMES`; -1: of the free range."""
    flip: np.ndarray
    """bool (b, v): mirrored left to right."""
    blur_sigma: np.ndarray
    """float64 (b, v): pixels of the view; 0: no blur."""
    noise_hu: np.ndarray
    """float64 (b, v): standard deviation of the noise; 0: none."""
    noise_key: np.ndarray
    """uint32 (b, v, 2): what the noise is a function of, beside the pixel."""
    gamma: np.ndarray
    """float64 (b, v): exponent of the windowed value; 1: none."""
    mm_per_pixel: np.ndarray
    """float64 (b, v, 2): size of a pixel of the view along y and x, mm: spacing x box / side."""
    num_global: int
    sizes: np.ndarray
    """int (b, 2): true size of each slice, y and x, pixels."""

    def describe(self, row: int, view: int) -> tuple[str, str]:
        """A view in words, for under a picture: its HU window, and what else was done to it ("" for nothing)."""
        number = int(self.preset[row, view])
        level, width = self.level_hu[row, view], self.width_hu[row, view]
        named = "" if number == FREE else PRESET_NAMES[number]
        window = f"{named} {level:.0f} / {width:.0f}" if named else f"L {level:.0f}  W {width:.0f} HU"
        done = {
            f"blur {self.blur_sigma[row, view]:.1f}": self.blur_sigma[row, view] > 0,
            f"±{self.noise_hu[row, view]:.0f} HU": self.noise_hu[row, view] > 0,
            f"γ {self.gamma[row, view]:.2f}": self.gamma[row, view] != 1,
            "flipped": self.flip[row, view],
        }
        return window, "  ".join(text for text, is_so in done.items() if is_so)


def draw_views(
    settings: ViewSettings, *, seed: int, position: int, rows: np.ndarray, sizes: np.ndarray, spacing_mm: np.ndarray
) -> ViewPlan:
    """Draw the views of b windows.

    position: number of the global batch; rows: int (b,), each window's place in it; sizes: int (b, 2), the true size of
    its slices, y and x, at least 1; spacing_mm: float (b, 3), z, y, x. Pure: equal arguments give equal plans, and a
    row's views do not depend on the other rows. Box, HU window, preset, flip, blur, noise and gamma are streams of
    their own: changing how one is drawn leaves the others.
    """
    rows, sizes = np.asarray(rows), np.asarray(sizes)

    def numbers(stream: str, count: int, needed: float | None = 1.0) -> np.ndarray:
        """(b, v, count); zeros, which cost nothing, where nobody needs them."""
        if not needed:
            return np.zeros((len(rows), settings.num_views, count))
        return uniform(seed, f"views.{stream}", position, rows, settings.num_views, count)

    def drawn(stream: str, probability: float | np.ndarray, values: np.ndarray, none: float) -> np.ndarray:
        """(b, v): `values` in the views that the stream chooses, `none` in the others."""
        return np.where(numbers(stream, 1, np.max(probability))[..., 0] < probability, values, none)

    blurred = np.array(settings.blur_probability)[np.minimum(np.arange(settings.num_views), 1)]
    blurred[settings.num_global :] = settings.blur_probability[2]
    noisy, policy = settings.noise_probability, settings.hu_policy
    sigma = _between(settings.blur_sigma, numbers("blur_sigma", 1, blurred.max())[..., 0])
    noise = _between(settings.noise_hu, numbers("noise_hu", 1, noisy)[..., 0])
    low, high = settings.gamma
    gamma = low * (high / low) ** numbers("gamma_exponent", 1, settings.gamma_probability)[..., 0]
    boxes = _boxes(numbers("box", 4), settings, sizes)
    preset = policy.chosen(numbers("preset", 1, settings.window_presets is not None)[..., 0])
    level_hu, width_hu = policy.windows(preset, numbers("window", 2))
    return ViewPlan(
        boxes=boxes,
        level_hu=level_hu,
        width_hu=width_hu,
        preset=preset,
        flip=numbers("flip", 1, settings.flip_probability)[..., 0] < settings.flip_probability,
        blur_sigma=drawn("blur", blurred, sigma, 0.0),
        noise_hu=drawn("noise", noisy, noise, 0.0),
        noise_key=np.floor(numbers("noise_key", 2, noisy) * 2.0**32).astype(np.uint32),
        gamma=drawn("gamma", settings.gamma_probability, gamma, 1.0),
        mm_per_pixel=np.asarray(spacing_mm)[:, None, 1:] * boxes[..., 2:] / settings.view_sizes[:, None],
        num_global=settings.num_global,
        sizes=sizes,
    )


def _between(bounds: Range, numbers: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * numbers


def _boxes(numbers: np.ndarray, settings: ViewSettings, sizes: np.ndarray) -> np.ndarray:
    """float64 (b, v, 4) from uniform numbers (b, v, 4) and sizes (b, 2).

    A random resized crop without rejection: the area is exactly what is drawn, and the aspect is drawn among those that
    fit at this area (where none of the wanted does, the nearest that fits). Rejecting boxes that do not fit, as is
    usual, favours small areas.
    """
    is_global = np.arange(settings.num_views)[:, None] < settings.num_global
    smallest, largest = np.where(is_global, settings.global_scale, settings.local_scale).T
    height_limit, width_limit = sizes[:, None, 0].astype(np.float64), sizes[:, None, 1].astype(np.float64)
    area = smallest + (largest - smallest) * numbers[..., 0]
    slimmest, widest = area * width_limit / height_limit, width_limit / (height_limit * area)
    low, high = (np.clip(wanted, slimmest, widest) for wanted in settings.aspect)
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
