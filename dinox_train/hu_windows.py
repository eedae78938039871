"""Intensity windows of views: the presets that people read CT with, and what a view's random numbers make of a policy.

A policy is a free range of levels and widths, or a weighted choice of presets with jitter. Host only: numpy.

Invariant: a window is a function of the policy and the view's own numbers; a preset keeps its number, new ones go to
the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dinox_model.fields import nearest

Range = tuple[float, float]
FREE = -1
"""In the place of a preset's number: the window is of the free range."""


@dataclass(frozen=True)
class HuWindow:
    """Black at level - width / 2, white at level + width / 2, HU; and who shows it so."""

    level_hu: float
    width_hu: float
    source: str


HU_WINDOWS: dict[str, HuWindow] = {
    "lung": HuWindow(-600.0, 1500.0, "Radiopaedia, 'Windowing (CT)': lungs"),
    "mediastinum": HuWindow(40.0, 400.0, "dwv (DICOM Web Viewer), defaultPresets.CT"),
    "bone": HuWindow(400.0, 1800.0, "Radiopaedia, 'Windowing (CT)': bone"),
    "brain": HuWindow(40.0, 80.0, "Radiopaedia, 'Windowing (CT)': brain; dwv"),
    "liver": HuWindow(60.0, 160.0, "CTViewer: liver"),
    "wide": HuWindow(-250.0, 1500.0, "tools/preview_shards.py: lung and soft tissue together"),
}
"""The presets by name. No standard fixes them: viewers and departments differ by some tens of HU, hence the jitter."""
PRESET_NAMES = tuple(HU_WINDOWS)


@dataclass(frozen=True)
class HuPolicy:
    """How a view's window is drawn: from the free range, or, where `weights` is given, around one of the presets."""

    level_hu: Range
    width_hu: Range
    weights: Mapping[str, float] | None
    jitter: float

    def __post_init__(self) -> None:
        for name, weight in (self.weights or {}).items():
            if name not in HU_WINDOWS:
                raise ValueError(f"window_presets: unknown preset {name!r}{nearest(name, HU_WINDOWS)}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"window_presets: the weight of {name} must be a number from 0 on, not {weight}")
        if self.weights is not None and not sum(self.weights.values()) > 0:
            raise ValueError("window_presets: give at least one preset a weight above 0, or null for the free range")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"preset_jitter must be in [0, 1), not {self.jitter}")

    def shares(self) -> np.ndarray:
        """float64 (presets,): how often each of PRESET_NAMES is chosen; ValueError where none is."""
        if self.weights is None:
            raise ValueError("a free range chooses no preset")
        weights = np.array([self.weights.get(name, 0.0) for name in PRESET_NAMES], np.float64)
        return weights / weights.sum()

    def chosen(self, numbers: np.ndarray) -> np.ndarray:
        """int64, the shape of `numbers` (uniform in [0, 1)): the preset of each view, FREE without presets."""
        if self.weights is None:
            return np.full(numbers.shape, FREE)
        ends = np.cumsum(self.shares())
        ends[np.flatnonzero(self.shares())[-1] :] = 1.0  # rounding must not lead past the last that has a weight
        return np.searchsorted(ends, numbers, side="right")

    def windows(self, preset: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Level and width, HU, float64 (...), of presets (...) as `chosen` gives them and uniform numbers (..., 2).

        Free range: the level uniform in `level_hu`, the width log-uniform in `width_hu`. Around a preset of level L and
        width W with jitter j: the level uniform in L -+ j W, the width log-uniform in W / (1 + j) to W (1 + j).
        """
        if self.weights is None:
            (low, high), (narrow, broad) = self.level_hu, self.width_hu
            return low + (high - low) * numbers[..., 0], narrow * (broad / narrow) ** numbers[..., 1]
        levels = np.array([one.level_hu for one in HU_WINDOWS.values()])[preset]
        widths = np.array([one.width_hu for one in HU_WINDOWS.values()])[preset]
        around = 2 * numbers - 1
        return levels + self.jitter * widths * around[..., 0], widths * (1 + self.jitter) ** around[..., 1]

    def mean_window(self) -> tuple[float, float]:
        """The mean of the drawn levels and the geometric mean of the drawn widths, HU: one window for whole slices."""
        if self.weights is None:
            return sum(self.level_hu) / 2, float(np.sqrt(self.width_hu[0] * self.width_hu[1]))
        shares = self.shares()
        levels = np.array([one.level_hu for one in HU_WINDOWS.values()])
        widths = np.array([one.width_hu for one in HU_WINDOWS.values()])
        return float(shares @ levels), float(np.exp(shares @ np.log(widths)))
