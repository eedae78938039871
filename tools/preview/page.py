"""A dark page of a fixed size in pixels: pictures and texts at given places, written as PNG.

Invariant: the same content gives the same bytes: no date, no name of a program; pictures are not resampled.
Places are (x, y) of the upper left corner, y downwards, in pixels.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dinox_io.atomic import write_atomically

BACKGROUND, INK, FAINT, BLUE, ORANGE = "#101418", "#e8ecf0", "#93a0ad", "#6fa8dc", "#e69f5b"
_DPI = 100


class Page:
    """A page of `width` x `height` pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._pictures: list[tuple[int, int, np.ndarray]] = []
        self._figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=BACKGROUND)
        self._canvas = FigureCanvasAgg(self._figure)

    def picture(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Put a picture, uint8 (rows, columns) or (rows, columns, 3), there, above all texts."""
        self._pictures.append((x, y, pixels if pixels.ndim == 3 else pixels[..., None]))

    def text(self, x: float, y: float, text: str, *, size: float = 9, color: str = INK, bold: bool = False) -> None:
        """Write a line, its top at y. `size` in points (of 100 / 72 pixels)."""
        self._figure.text(
            x / self.width, 1 - y / self.height, text, color=color, fontsize=size, va="top", ha="left",
            weight="bold" if bold else "normal", parse_math=False,
        )  # fmt: skip

    def axes(self, x: int, y: int, width: int, height: int) -> Axes:
        """Dark axes in a box."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self._figure.add_axes(place, facecolor=BACKGROUND)
        axes.tick_params(colors=FAINT, labelsize=8)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(FAINT)
        return axes

    def png(self) -> bytes:
        """The page as PNG."""
        self._canvas.draw()
        drawn = np.array(self._canvas.buffer_rgba())[..., :3]
        # Into what was drawn, not through it: drawing them would take longer than all the rest.
        for x, y, pixels in self._pictures:
            drawn[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        stream = io.BytesIO()
        # Level 4: half the time of the default for a few per cent more bytes.
        Image.fromarray(np.ascontiguousarray(drawn)).save(stream, "PNG", compress_level=4)
        return stream.getvalue()

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all. Raises OSError."""
        write_atomically(path, self.png())
