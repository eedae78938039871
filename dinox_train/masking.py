"""Which patches of the global crops the student does not see.

Of all C crops of an update, int(C * fraction) are masked. Their shares of masked patches are spread evenly over
`share`: the i-th of them has exactly int(P * linspace(low, high, n + 1)[i]) masked of its P patches, i from 1. Which
crop gets which is shuffled over the update; where the patches lie is drawn for each crop: rectangles first, since a
lone patch can be guessed from those beside it, then single patches up to the exact number (Bao et al., BEiT, arXiv
2106.08254, algorithm 1; the exact number as in DINOv3).

Invariants: the number of masked patches of an update depends on its shape alone, never on what was drawn (of its
micro-batches only the sum does); what is masked in a row depends on (seed, position, row, view) and the size of the
batch, so that it is the same however the batch is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinox_train.keyed import uniform

SMALLEST_BLOCK = 4.0
"""Patches that a rectangle is to have at least (fewer where fewer are left), before rounding."""
LARGEST_BLOCK = 0.5
"""Share of a crop's patches that one rectangle is to have at most."""
ASPECT = (0.3, 1 / 0.3)
"""Height of a rectangle over its width, log-uniform."""
TRIES = 32
"""Rectangles tried for a crop, at most."""
TRIES_IN_VAIN = 10
"""After so many in a row that did not fit, no more are tried."""

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How masks are drawn. Raises ValueError for shares outside [0, 1]."""

    fraction: float = 0.5
    """Of all global crops of an update, those that are masked."""
    share: tuple[float, float] = (0.1, 0.5)
    """Of a masked crop's patches, those that are masked: from the first (not included) to the last (included)."""
    blocks: bool = True
    """Rectangles first; False: single patches only, as a masked autoencoder has them."""

    def __post_init__(self) -> None:
        low, high = self.share
        if not (0 <= low <= high <= 1 and 0 <= self.fraction <= 1):
            raise ValueError(
                f"fraction and share (low <= high) must be in [0, 1], not {self.fraction} and {self.share}"
            )


@dataclass(frozen=True)
class MaskPlan:
    """Masks of b rows of an update, V global crops each, view-major (crop = view * b + row). NumPy, on the host."""

    masks: np.ndarray
    """bool (V*b, P): true where the student sees the mask token."""
    indices: np.ndarray
    """int64 (m,): where `masks`, flattened, is true, in order; picks patches (V*b, P, d).flatten(0, 1)."""
    weights: np.ndarray
    """float32 (m,): 1 / number of masked patches of the crop that the patch belongs to."""


def masked_counts(settings: MaskSettings, *, num_crops: int, num_patches: int) -> np.ndarray:
    """int64 (num_crops,): masked patches of each crop of an update before they are shuffled, ascending; 0 is unmasked.

    Their sum is the m of a whole update.
    """
    masked = int(num_crops * settings.fraction)
    shares = np.linspace(*settings.share, masked + 1)[1:]
    counts = np.zeros(num_crops, np.int64)
    counts[num_crops - masked :] = (num_patches * shares).astype(np.int64)
    return counts


def draw_masks(
    settings: MaskSettings, *, seed: int, position: int, rows: np.ndarray, batch_size: int, num_views: int, grid: Grid
) -> MaskPlan:
    """Draw the masks of b rows of an update.

    position: number of the global batch; rows: int (b,), each window's place in it; batch_size: windows of the whole of
    it; num_views: global crops of a window; grid: rows and columns of patches. Pure: equal arguments give equal plans,
    and a row's masks do not depend on which other rows are asked for. Raises ValueError for a row outside the batch.
    """
    rows = np.asarray(rows)
    if len(rows) and not (rows.min() >= 0 and rows.max() < batch_size):
        raise ValueError(f"rows reach from {rows.min()} to {rows.max()}, and the batch has {batch_size}")
    num_patches = grid[0] * grid[1]
    counts = _shuffled_counts(settings, seed, position, batch_size, num_views, num_patches)
    wanted = counts[:, rows].reshape(-1)
    masks = np.zeros((len(wanted), num_patches), bool)
    # Numbers are drawn for the crops that use them: half of them are not masked.
    masked = np.flatnonzero(wanted)
    crop_rows, crop_views = np.tile(rows, num_views)[masked], np.repeat(np.arange(num_views), len(rows))[masked]
    chosen = np.zeros((len(masked), *grid), bool)
    if settings.blocks:
        numbers = _of_crops(seed, "masks.blocks", position, crop_rows, crop_views, num_views, 4 * TRIES)
        chosen = _draw_blocks(numbers.reshape(-1, TRIES, 4), wanted[masked], grid)
    numbers = _of_crops(seed, "masks.patches", position, crop_rows, crop_views, num_views, num_patches)
    masks[masked] = _top_up(chosen.reshape(-1, num_patches), numbers, wanted[masked])
    masked_per_crop = masks.sum(axis=1)
    weights = np.repeat(1 / np.maximum(masked_per_crop, 1), masked_per_crop).astype(np.float32)
    return MaskPlan(masks=masks, indices=np.flatnonzero(masks), weights=weights)


def draw_patches(
    *, seed: int, position: int, rows: np.ndarray, num_views: int, num_patches: int, count: int
) -> np.ndarray:
    """`count` different patches of each crop, all equally likely, ascending: int64 (num_views*b, count), view-major.

    Keyed like masks. For the loss over pairs of patches, whose cost is to be bounded (`gram.take_patches`). Raises
    ValueError for more patches than there are.
    """
    if not 0 <= count <= num_patches:
        raise ValueError(f"{count} different patches of {num_patches} cannot be drawn")
    numbers = uniform(seed, "masks.subset", position, rows, num_views, num_patches)
    order = np.argsort(numbers.swapaxes(0, 1).reshape(-1, num_patches), axis=1, kind="stable")
    return np.sort(order[:, :count], axis=1)


def _shuffled_counts(
    settings: MaskSettings, seed: int, position: int, batch_size: int, num_views: int, num_patches: int
) -> np.ndarray:
    """int64 (V, B): masked patches of each crop of the update."""
    counts = masked_counts(settings, num_crops=num_views * batch_size, num_patches=num_patches)
    numbers = uniform(seed, "masks.order", position, np.arange(batch_size), num_views, 1)[..., 0].T
    shuffled = np.empty_like(counts)
    shuffled[np.argsort(numbers, axis=None, kind="stable")] = counts
    return shuffled.reshape(num_views, batch_size)


def _of_crops(
    seed: int, stream: str, position: int, rows: np.ndarray, views: np.ndarray, num_views: int, count: int
) -> np.ndarray:
    """float64 (crops, count): the uniform numbers of crops, each a row and a view."""
    numbers = np.empty((len(rows), count))
    for view in range(num_views):
        of_view = views == view
        numbers[of_view] = uniform(seed, f"{stream}.{view}", position, rows[of_view], 1, count)[:, 0]
    return numbers


def _draw_blocks(numbers: np.ndarray, wanted: np.ndarray, grid: Grid) -> np.ndarray:
    """bool (crops, H, W): rectangles, together at most `wanted` patches. numbers: uniform (crops, tries, 4).

    All crops at once, try by try. A rectangle must fit into the grid, add a patch, and not add more than are wanted.
    """
    height, width = grid
    down, across = np.arange(height)[:, None], np.arange(width)
    masks = np.zeros((len(wanted), height, width), bool)
    remaining, in_vain = wanted.copy(), np.zeros_like(wanted)
    for number in range(numbers.shape[1]):
        active = np.flatnonzero((remaining > 0) & (in_vain < TRIES_IN_VAIN))
        if not len(active):
            break
        tall, wide, top, left = _rectangles(numbers[active, number], remaining[active], grid)
        inside = (down >= top) & (down < top + tall) & (across >= left) & (across < left + wide)
        added = (inside & ~masks[active]).sum(axis=(1, 2))
        fits = (tall <= height) & (wide <= width)
        good = fits[:, 0, 0] & (added > 0) & (added <= remaining[active])
        masks[active[good]] |= inside[good]
        remaining[active[good]] -= added[good]
        in_vain[active] = np.where(good, 0, in_vain[active] + 1)
    return masks


def _rectangles(numbers: np.ndarray, remaining: np.ndarray, grid: Grid) -> tuple[np.ndarray, ...]:
    """Height, width, top and left of a rectangle for each crop: int64 (crops, 1, 1) each, from numbers (crops, 4)."""
    height, width = grid
    largest = np.minimum(remaining, LARGEST_BLOCK * height * width)
    area = SMALLEST_BLOCK + (largest - SMALLEST_BLOCK) * numbers[:, 0]
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** numbers[:, 1]
    tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    top, left = np.floor((height - tall + 1) * numbers[:, 2]), np.floor((width - wide + 1) * numbers[:, 3])
    return tuple(each.astype(np.int64)[:, None, None] for each in (tall, wide, top, left))


def _top_up(masks: np.ndarray, numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`masks` (crops, P) with the unmasked patches of the smallest `numbers` (crops, P) masked, up to `wanted`."""
    missing = wanted - masks.sum(axis=1)
    order = np.argsort(np.where(masks, np.inf, numbers), axis=1, kind="stable")
    added = np.zeros_like(masks)
    np.put_along_axis(added, order, np.arange(masks.shape[1]) < missing[:, None], axis=1)
    return masks | added
