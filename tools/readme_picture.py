#!/usr/bin/env python3
"""Draw the README's picture from a finished demo: its loss, its views, and the features of slices it never saw.

python tools/readme_picture.py demo/run docs/images/demo_report.png
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from dinox_io.atomic import write_atomically

BACKGROUND, INK, FAINT, BLUE, ORANGE = "#101418", "#e8ecf0", "#93a0ad", "#6fa8dc", "#e69f5b"


class PictureError(Exception):
    """What is missing for the picture, where, and what to do."""


def read_run(run: Path) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Lines of metrics.jsonl, and the pictures of views and of patch features. Raises PictureError."""
    metrics = run / "metrics.jsonl"
    pictures = [run / "pictures" / f"{name}.png" for name in ("views", "patch_features")]
    for file in (metrics, *pictures):
        if not file.is_file():
            raise PictureError(f"{file} is not there: {run} is no finished run. `make demo` makes one in demo/run.")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise PictureError(f"{metrics} holds no update yet: let the run go on to its end.")
    views, features = (imread(file) for file in pictures)
    return lines, views, features


def draw(run: Path, picture: Path) -> None:
    """Write `picture` (PNG) from RUN/metrics.jsonl and RUN/pictures/. Raises PictureError."""
    lines, views, features = read_run(run)
    figure = Figure(figsize=(14, 7), dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    _curve(figure, lines)
    _show(
        figure,
        views,
        (0.02, 0.03, 0.55, 0.53),
        "what the network sees: crops of a window, each through its own HU window",
    )
    _show(figure, features, (0.6, 0.03, 0.38, 0.9), "held-out slices, and what their patch features say")
    picture.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor=BACKGROUND, metadata={"Software": None})
    write_atomically(picture, drawn.getvalue())


def _curve(figure: Figure, lines: list[dict[str, Any]]) -> None:
    axes = figure.add_axes((0.06, 0.68, 0.5, 0.25), facecolor=BACKGROUND)
    updates, loss = [line["update"] for line in lines], np.array([line["loss"] for line in lines], float)
    checked = [(line["update"], line["loss_val"]) for line in lines if line["loss_val"] is not None]
    axes.plot(updates, loss, color=BLUE, linewidth=1, label="loss")
    if checked:
        axes.plot(*zip(*checked, strict=True), color=ORANGE, marker="o", label="on patients it never saw")
    axes.set_title("loss, by update", color=INK, fontsize=10, loc="left")
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.legend(labelcolor=INK, frameon=False, fontsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _show(figure: Figure, image: np.ndarray, place: tuple[float, float, float, float], title: str) -> None:
    axes = figure.add_axes(place)
    axes.set_axis_off()
    axes.imshow(image)
    axes.set_title(title, color=INK, fontsize=10, loc="left")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, e.g. demo/run")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    values = parser.parse_args(arguments)
    try:
        draw(values.run, values.picture)
    except (PictureError, OSError) as error:
        print(f"readme_picture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
