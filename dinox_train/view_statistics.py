"""Mean and standard deviation of what views show, from a set's HU histogram and the policy of their windows.

    E[x], E[x^2] over (voxel of the histogram) x (window of the policy) x (gamma)  ─▶  mean, std of `Preprocess`

Blur, noise and resampling are left out: they leave the mean almost, and change the standard deviation by less than
windows do from view to view.

Invariant: a function of histogram and settings alone; nothing is drawn.
"""

from __future__ import annotations

import math

import numpy as np

from dinox_model.preprocess import HISTOGRAM_BIN_HU, HISTOGRAM_BINS
from dinox_train.hu_windows import PRESET_NAMES
from dinox_train.view_plan import ViewSettings

WINDOW_NODES, GAMMA_NODES = 24, 8
"""Middles of so many equal steps along each of a window's two numbers, and along that of gamma."""
SMALLEST_STD = 1e-6


def statistics_under_policy(hu_histogram: np.ndarray, settings: ViewSettings) -> tuple[float, float]:
    """Mean and standard deviation of windowed values, in [0, 1], as `Preprocess.mean` and `.std` take them.

    hu_histogram: integers (4096,), voxels in bins of 16 HU from -32768, none negative; a bin's voxels count as its
    middle. The expectation is over all voxels and all windows and gammas that `settings` draw, each as often as they
    draw it. Raises ValueError for another shape, negative counts, or voxels that all look alike under every window.
    """
    counts = np.asarray(hu_histogram)
    if counts.shape != (HISTOGRAM_BINS,) or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(
            f"a histogram of HU is {HISTOGRAM_BINS} integers, none negative, not {counts.dtype} {counts.shape}"
        )
    filled = np.flatnonzero(counts)
    hu = -32768 + HISTOGRAM_BIN_HU * filled + (HISTOGRAM_BIN_HU - 1) / 2
    shares = counts[filled] / max(int(counts.sum()), 1)
    levels, widths, weights = _windows(settings)
    mean = square = 0.0
    for level, width, weight in zip(levels, widths, weights, strict=True):
        shown = np.clip((hu - (level - width / 2)) / width, 0.0, 1.0)
        for exponent, often in _gammas(settings):
            curved = shown if exponent == 1.0 else shown**exponent
            mean += weight * often * float(shares @ curved)
            square += weight * often * float(shares @ (curved * curved))
    std = math.sqrt(max(square - mean * mean, 0.0))
    if std < SMALLEST_STD:
        raise ValueError(
            f"all {int(counts.sum())} voxels of the histogram look alike under every HU window of the views: choose "
            "windows that show something"
        )
    return mean, std


def _windows(settings: ViewSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels, widths (HU) and weights (sum 1) that stand for all windows of the policy."""
    policy = settings.hu_policy
    steps = (np.arange(WINDOW_NODES) + 0.5) / WINDOW_NODES
    numbers = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    shares = np.ones(1) if policy.weights is None else policy.shares()
    presets = np.zeros(1, int) if policy.weights is None else np.arange(len(PRESET_NAMES))
    used = shares > 0
    levels, widths = policy.windows(presets[used][:, None], numbers[None])
    weights = np.broadcast_to(shares[used][:, None] / len(numbers), (int(used.sum()), len(numbers)))
    shape = weights.shape
    return np.broadcast_to(levels, shape).ravel(), np.broadcast_to(widths, shape).ravel(), weights.ravel()


def _gammas(settings: ViewSettings) -> list[tuple[float, float]]:
    """Exponents and how often each stands for a view's."""
    low, high = settings.gamma
    steps = (np.arange(GAMMA_NODES) + 0.5) / GAMMA_NODES
    curved = settings.gamma_probability
    drawn = [(float(low * (high / low) ** step), curved / GAMMA_NODES) for step in steps] if curved else []
    return [(1.0, 1.0 - curved), *drawn]
