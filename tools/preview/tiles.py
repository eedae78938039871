"""Hounsfield units as grey pictures: window presets, and planes of a volume at their true proportions in mm.

Invariant: a pixel of a picture is as wide as it is high in mm, whatever the spacing; nothing is stretched to fit.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class HuWindow:
    """What of the HU scale is shown: black at level - width / 2, white at level + width / 2."""

    name: str
    level_hu: float
    width_hu: float

    @property
    def label(self) -> str:
        """`lung  -600 / 1500 HU`."""
        return f"{self.name}  {self.level_hu:g} / {self.width_hu:g} HU"


LUNG = HuWindow("lung", -600, 1500)
SOFT_TISSUE = HuWindow("soft tissue", 40, 400)
BONE = HuWindow("bone", 500, 2000)
WIDE = HuWindow("lung and soft tissue", -250, 1500)


def gray(hu: np.ndarray, window: HuWindow) -> np.ndarray:
    """HU of any shape -> uint8 of the same shape."""
    low = window.level_hu - window.width_hu / 2
    return np.clip((hu - low) * (255 / window.width_hu) + 0.5, 0, 255).astype(np.uint8)


def fitted(size_mm: tuple[float, float], box: tuple[int, int]) -> tuple[int, int]:
    """The largest size in pixels (rows, columns) with the proportions of `size_mm` (y, x) that fits into a box."""
    scale = min(box[0] / size_mm[0], box[1] / size_mm[1])
    rows, columns = (max(1, round(edge * scale)) for edge in size_mm)
    return min(rows, box[0]), min(columns, box[1])


def resized(plane_hu: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A plane of HU at another size (rows, columns), float32: averaged to shrink, interpolated to grow."""
    picture = Image.fromarray(np.ascontiguousarray(plane_hu, np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
