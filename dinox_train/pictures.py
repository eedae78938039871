"""Pictures of a run, as PNG files in RUN/pictures/: what the network sees, and what its features say.

Invariant: a picture is a pure function of the arrays handed in: same arrays and same matplotlib, same bytes (no time,
no software name in the file), and a file is whole or absent. Nothing here knows of patients, volumes or paths.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinox_io.atomic import write_atomically

if TYPE_CHECKING:
    from dinox_train.step import ViewBatch
    from dinox_train.views import ViewPlan

BACKGROUND, INK, FAINT = "#101418", "#e8ecf0", "#93a0ad"  # dark, as CT is read, and calm on a light page too
DOTS_PER_INCH = 100
PATCH_SIZE = 16  # of all presets
NAME_INCHES, STRIP_INCHES, GAP_INCHES = 0.3, 0.3, 0.06  # column names, the text above a tile, the space between tiles


def save_views_picture(
    path: Path, views: ViewBatch, plan: ViewPlan, mean: float, std: float, *, windows: int = 4
) -> None:
    """Write a grid: a row for each of the first `windows` windows, a column for each global and then each local view.

    views: `global_views` float (num_global * b, k, G, G) and `local_views` float (num_local * b, k, L, L; may have no
    rows), normalised and in view-major order, as `render_views` returns them; the middle channel is shown, taken back
    to [0, 1] by `mean` and `std`. plan: its `num_global`, and what it says of each view for the text above. Writes
    `path` (PNG) atomically, making its folder. ValueError where the shapes do not fit each other.
    """
    batch, num_views = plan.level_hu.shape
    found = (len(views.global_views), len(views.local_views))
    expected = (plan.num_global * batch, (num_views - plan.num_global) * batch)
    _need(found == expected, "rows of global and local views", found, f"{expected} for a plan of {(batch, num_views)}")
    rows = range(min(windows, batch))
    tiles, texts = [], []
    for row in rows:
        images = [*views.global_views[row::batch], *views.local_views[row::batch]]
        middle = [image[image.shape[0] // 2].float().cpu().numpy() for image in images]
        tiles.append([np.clip(image * std + mean, 0, 1) for image in middle])
        texts.append(["\n".join(plan.describe(row, view)).strip() for view in range(num_views)])
    names = [f"global {1 + v}" if v < plan.num_global else f"local {1 + v - plan.num_global}" for v in range(num_views)]
    _write(path, _sheet(tiles, names, texts, tile_inches=1.35))


def save_patch_pca(
    path: Path,
    slices: Sequence[np.ndarray] | np.ndarray,
    patch_features: Sequence[np.ndarray] | np.ndarray,
    grids: Sequence[tuple[int, int]],
    *,
    held_out: bool = True,
    patch_size: int = PATCH_SIZE,
) -> None:
    """Write slices (rows), each beside its patch features as colours: one set of components for all rows.

    slices: (Y, X) gray in [0, 1] each; patch_features: (h * w, d) each, row by row; grids: (h, w) each, where
    h = ceil(Y / patch_size): what the network padded at the lower and right edge is shown black. held_out: whether the
    run never trains on these slices, which the picture says. Writes `path` (PNG) atomically, making its folder.
    ValueError where the shapes do not fit each other.
    """
    for gray, features, (height, width) in zip(slices, patch_features, grids, strict=True):
        needed = (-(-gray.shape[0] // patch_size), -(-gray.shape[1] // patch_size))
        fits = (height, width) == needed and features.ndim == 2 and len(features) == height * width
        _need(fits, "slice, patch features and grid", (gray.shape, features.shape, (height, width)), f"a grid {needed}")
    _need(len(slices) > 0, "slices", 0, "at least one")
    colours = np.split(
        principal_colours(np.concatenate(patch_features)), np.cumsum([len(f) for f in patch_features])[:-1]
    )
    tiles = []
    for gray, colour, (height, width) in zip(slices, colours, grids, strict=True):
        padded = np.zeros((height * patch_size, width * patch_size), np.float32)
        padded[: gray.shape[0], : gray.shape[1]] = gray
        tiles.append([padded, colour.reshape(height, width, 3)])
    names = ["held-out slice" if held_out else "training slice", "its patch features"]
    _write(path, _sheet(tiles, names, tile_inches=3.2))


def save_sheet(
    path: Path,
    lines: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
    *,
    tile_inches: float,
) -> None:
    """Write rows of tiles, gray (y, x) or coloured (y, x, 3) in [0, 1], with a name above each column and, where given,
    a text above each tile. Writes `path` (PNG) atomically, making its folder."""
    _write(path, _sheet(lines, names, texts, tile_inches=tile_inches))


def principal_colours(features: np.ndarray) -> np.ndarray:
    """The first three principal components of (n, d) features as float64 colours (n, 3) in [0, 1].

    Each component is stretched from its 1st to its 99th percentile; one without spread is 0.5. The sign of a component
    is free, so it is fixed: the entry of largest magnitude of its direction is positive.
    """
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :3]
    largest = np.abs(directions).argmax(axis=0)
    scores = centred @ (directions * np.sign(directions[largest, np.arange(directions.shape[1])]))
    low, high = np.percentile(scores, [1, 99], axis=0)
    # Rounding leaves a spread in components that have none; it must not be stretched into colours.
    real = high - low > 1e-6 * max(float(np.abs(features).max()), 1e-30)
    stretched = np.clip((scores - low) / np.where(real, high - low, 1), 0, 1)
    colours = np.full((len(features), 3), 0.5)
    colours[:, : scores.shape[1]] = np.where(real, stretched, 0.5)
    return colours


def _sheet(
    lines: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
    *,
    tile_inches: float,
) -> Figure:
    """Tiles in rows of equal height; column names on top, a text above each tile where given."""
    tile_height = tile_inches * max(tile.shape[0] / tile.shape[1] for line in lines for tile in line)
    strip, gap = STRIP_INCHES if texts else 0.0, GAP_INCHES
    total_width = len(names) * (tile_inches + gap) + gap
    total_height = NAME_INCHES + len(lines) * (strip + tile_height + gap)
    figure = Figure(figsize=(total_width, total_height), dpi=DOTS_PER_INCH, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    for column, name in enumerate(names):
        left = gap + column * (tile_inches + gap)
        middle = (left + tile_inches / 2) / total_width
        _text(figure, middle, 1 - NAME_INCHES / 2 / total_height, name, INK, 9)
        for row, line in enumerate(lines):
            bottom = total_height - NAME_INCHES - (row + 1) * (strip + tile_height + gap) + gap
            tile = line[column]
            # A tile that is less high than the highest keeps its pixels square.
            height = tile_inches * tile.shape[0] / tile.shape[1]
            top = bottom + tile_height
            _show(
                figure,
                tile,
                (left / total_width, (top - height) / total_height, tile_inches / total_width, height / total_height),
            )
            if texts:
                _text(figure, middle, (top + strip / 2) / total_height, texts[row][column], FAINT, 7)
    return figure


def _show(figure: Figure, tile: np.ndarray, place: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(place)
    axes.set_axis_off()
    # Patches are squares: enlarging them must not blur them. Slices are shrunk, where smoothing prevents moiré.
    interpolation = "nearest" if tile.ndim == 3 else "antialiased"
    axes.imshow(tile, cmap="gray", vmin=0, vmax=1, interpolation=interpolation, aspect="auto")


def _text(figure: Figure, x: float, y: float, text: str, colour: str, points: int) -> None:
    figure.text(x, y, text, color=colour, fontsize=points, ha="center", va="center", family="DejaVu Sans")


def _write(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    # matplotlib writes its version into the file unless told not to.
    figure.savefig(buffer, format="png", facecolor=BACKGROUND, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _need(fits: bool, name: str, found: object, needed: str) -> None:
    if not fits:
        raise ValueError(f"{name}: found {found}, needed {needed}")
