"""Noise with the texture of a reconstruction kernel: Gaussian, correlated over about a pixel, no streaks.

Each slice's field is a pure function of its key, so slices can be made in any order. Slices thicker than their spacing
share part of what they measured: neighbouring fields are then correlated as overlapping boxes are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


def taps(blur_px: float) -> Array:
    """A normalised (unit energy) Gaussian filter, float32, of standard deviation `blur_px` pixels."""
    reach = max(1, int(np.ceil(3.0 * blur_px)))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / blur_px) ** 2)
    return (weights / np.sqrt((weights**2).sum())).astype(np.float32)


def correlated(rows: int, columns: int, blur_px: float, key: tuple[int, ...]) -> Array:
    """A field of mean 0 and standard deviation 1, float32 (rows, columns), the same for the same key."""
    weights = taps(blur_px)
    reach = len(weights) // 2
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    white = random.standard_normal((rows + 2 * reach, columns + 2 * reach), dtype=np.float32)
    across = np.zeros((rows + 2 * reach, columns), np.float32)
    for i, weight in enumerate(weights):
        across += weight * white[:, i : i + columns]
    field = np.zeros((rows, columns), np.float32)
    for i, weight in enumerate(weights):
        field += weight * across[i : i + rows]
    return field


def overlap_share(thickness_mm: float, spacing_mm: float) -> float:
    """Weight of the shared part: with it, neighbours correlate by 1 - spacing/thickness (0 without an overlap)."""
    correlation = max(0.0, 1.0 - spacing_mm / thickness_mm)
    if correlation > 0.5:
        raise ValueError(f"slices of {thickness_mm} mm every {spacing_mm} mm overlap more than this noise can model")
    return (1.0 - float(np.sqrt(1.0 - 4.0 * correlation**2))) / (2.0 * correlation) if correlation else 0.0


def slice_noise(
    rows: int, columns: int, *, sigma_hu: float, blur_px: float, overlap: float, key: tuple[int, ...], index: int
) -> Array:
    """The noise (HU, float32) of slice `index` of the series that `key` names; `overlap` from `overlap_share`."""
    field = correlated(rows, columns, blur_px, (*key, index))
    if overlap:
        field = (field + overlap * correlated(rows, columns, blur_px, (*key, index + 1))) / np.sqrt(1.0 + overlap**2)
    return np.asarray(sigma_hu * field, np.float32)
