"""HU to the floats a network sees: intensity window, normalisation, padding. Used by training and by `encode` alike.

    int16 HU ─▶ (hu - lower edge) / width, clamped to [0, 1] ─▶ (… - mean) / std

A `Preprocess` travels with the weights, so that a network never meets floats made otherwise than those it was trained
on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dinox_model.vit import VisionTransformer, ViTFeatures

AIR_HU = -1024
"""What lies beyond the edge of an image: air."""

HISTOGRAM_BINS = 4096
HISTOGRAM_BIN_HU = 16
"""A histogram of int16 HU has 4096 bins of 16 values each, the first from -32768."""


def window_hu(hu: Tensor, level_hu: float | Tensor, width_hu: float | Tensor) -> Tensor:
    """Map the intensity window to [0, 1] and clamp what is outside.

    `hu` is a float tensor; level and width (positive) are numbers, or tensors that broadcast with it: one for each
    image, say. Source: LINEAR_EXACT of DICOM PS3.3 C.11.2.1.3.2.
    """
    return ((hu - (level_hu - width_hu / 2.0)) / width_hu).clamp(0.0, 1.0)


def normalise(x: Tensor, mean: float, std: float) -> Tensor:
    """(x - mean) / std."""
    return (x - mean) / std


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How HU become a network's input. The default window, -1000 to 400 HU, shows lung and soft tissue.

    The last four are facts for whoever cuts windows from volumes; `apply` is given windows and needs none of them.
    """

    level_hu: float = -300.0
    """Middle of the intensity window of `apply`, HU. Training draws its own windows and shares mean and std."""
    width_hu: float = 1400.0
    mean: float = 0.5
    """Of the windowed values, one for all slices."""
    std: float = 0.25
    depth: int | None = None
    """Slices in a window of the training. None, here and below: nobody said."""
    step: int | None = None
    """How far apart they were, in slices; None also where `step_mm` says it."""
    step_mm: float | None = None
    """How far apart they were, millimetres: each volume's nearest number of slices, at least 1."""
    edge: str | None = field(default=None, repr=False)  # what was called by its repr before keeps its name
    """What a window saw beyond its volume's ends: "clamp", the last slice again, or "reflect", the mirrored slices.
    None also where training drew no such windows."""

    def __post_init__(self) -> None:
        for name in ("level_hu", "width_hu", "mean", "std", *(["step_mm"] if self.step_mm is not None else [])):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"Preprocess.{name} must be a finite number, not {value!r}")
            if name in ("width_hu", "std", "step_mm") and value <= 0:
                raise ValueError(f"Preprocess.{name} must be positive, not {value}")
        for name in ("depth", "step"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"Preprocess.{name} must be a whole number of at least 1, not {value!r}")
        if self.edge not in (None, "clamp", "reflect"):
            raise ValueError(f"Preprocess.edge must be clamp, reflect or null, not {self.edge!r}")
        if self.step is not None and self.step_mm is not None:
            raise ValueError(f"Preprocess has step {self.step} and step_mm {self.step_mm}: one of them is null")

    def apply(self, hu: Tensor, multiple: int = 16) -> Tensor:
        """int16 HU (b, k, y, x) to float32 (b, k, y', x') on the same device.

        y', x' are the next multiples of `multiple`, the patch size; what is added, below and to the right, is air.
        Raises TypeError or ValueError for another dtype or shape.
        """
        if hu.dtype != torch.int16:
            raise TypeError(f"HU must be int16, not {hu.dtype}: what was rescaled or windowed before is not HU")
        if hu.ndim != 4 or 0 in hu.shape:
            raise ValueError(f"HU must be (b, k, y, x), none of them 0, not {tuple(hu.shape)}")
        height, width = hu.shape[2:]
        padded = F.pad(hu, (0, -width % multiple, 0, -height % multiple), value=AIR_HU)
        return normalise(window_hu(padded.float(), self.level_hu, self.width_hu), self.mean, self.std)

    @classmethod
    def from_histogram(cls, counts: np.ndarray, level_hu: float, width_hu: float) -> Preprocess:
        """A window with the mean and standard deviation that it gives the voxels of a histogram.

        `counts`: integers (4096,), voxels in bins of 16 HU from -32768 (`HISTOGRAM_BIN_HU`); a bin's voxels count as
        its middle. Raises ValueError for another shape, negative counts, or voxels that all look alike in this window.
        """
        counts = np.asarray(counts)
        if counts.shape != (HISTOGRAM_BINS,) or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
            raise ValueError(
                f"a histogram of HU is {HISTOGRAM_BINS} integers, none negative, not {counts.dtype} {counts.shape}"
            )
        middles_hu = -32768 + HISTOGRAM_BIN_HU * np.arange(HISTOGRAM_BINS) + (HISTOGRAM_BIN_HU - 1) / 2
        values = window_hu(torch.from_numpy(middles_hu), level_hu, width_hu).numpy()
        total = int(counts.sum())
        mean = float(counts @ values) / max(total, 1)
        std = math.sqrt(float(counts @ (values - mean) ** 2) / max(total, 1))
        if std < 1e-6:
            window = f"the window of level {level_hu} HU and width {width_hu} HU"
            raise ValueError(
                f"all {total} voxels of the histogram look alike in {window}: choose one that shows something"
            )
        return cls(level_hu=level_hu, width_hu=width_hu, mean=mean, std=std)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


def encode(
    model: VisionTransformer, hu: Tensor | np.ndarray, spacing_mm: Tensor | np.ndarray | Sequence[Sequence[float]]
) -> ViTFeatures:
    """Features of windows of HU, with the preprocessing that training used; no gradients.

    `hu`: int16 (b, k, y, x) of any size, k the network's slices; an image whose sides are no multiples of the patch
    size is padded with air below and to the right. `spacing_mm`: (b, 3), z, y, x, each finite and not negative (z is 0
    for a single slice of unknown spacing). It is checked always, and changes features only of networks that look at
    the size of pixels (`config.uses_mm_per_pixel`).
    Raises TypeError or ValueError for another dtype or shape. The features lie on the network's device.
    """
    hu = torch.tensor(hu) if isinstance(hu, np.ndarray) else hu
    spacing = check_spacing(spacing_mm, num_images=hu.shape[0] if hu.ndim else 0)
    device = model.patch_embed.weight.device
    mm_per_pixel = spacing[:, 1:].float().to(device) if model.config.uses_mm_per_pixel else None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            x = model.preprocess.apply(hu.to(device), model.config.patch_size)
            return model(x, mm_per_pixel=mm_per_pixel)
    finally:
        model.train(was_training)


def check_spacing(spacing_mm: Tensor | np.ndarray | Sequence[Sequence[float]], num_images: int) -> Tensor:
    """`spacing_mm` as a tensor. Raises ValueError where it is not (num_images, 3) of sensible numbers."""
    spacing = torch.as_tensor(np.array(spacing_mm) if isinstance(spacing_mm, np.ndarray) else spacing_mm)
    if spacing.shape != (num_images, 3):
        raise ValueError(
            f"spacing_mm must be ({num_images}, 3): z, y, x in mm of each window, not {tuple(spacing.shape)}"
        )
    if not bool((spacing.isfinite() & (spacing >= 0)).all() and (spacing[:, 1:] > 0).all()):
        raise ValueError(f"spacing_mm must be finite, y and x positive, z not negative; it is {spacing.tolist()}")
    return spacing
