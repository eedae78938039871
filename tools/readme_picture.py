#!/usr/bin/env python3
"""Draw the README's picture from a finished demo: its loss, its views, and the features of slices it never saw.

python tools/readme_picture.py demo/run docs/images/demo_report.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

BACKGROUND, INK, FAINT, BLUE, ORANGE = "#101418", "#e8ecf0", "#93a0ad", "#6fa8dc", "#e69f5b"


def draw(run: Path, picture: Path) -> None:
    """Write `picture` (PNG) from RUN/metrics.jsonl and RUN/pictures/."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    views, features = (imread(run / "pictures" / f"{name}.png") for name in ("views", "patch_features"))
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
    figure.savefig(picture, facecolor=BACKGROUND, metadata={"Software": None})


def _curve(figure: Figure, lines: list[dict]) -> None:
    axes = figure.add_axes((0.06, 0.68, 0.5, 0.25), facecolor=BACKGROUND)
    updates, loss = [line["update"] for line in lines], np.array([line["loss"] for line in lines], float)
    checked = [(line["update"], line["loss_val"]) for line in lines if line["loss_val"] is not None]
    axes.plot(updates, loss, color=BLUE, linewidth=1, label="loss")
    axes.plot(
        *zip(*checked, strict=True), color=ORANGE, marker="o", label="on patients it never saw"
    ) if checked else None
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, e.g. demo/run")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    values = parser.parse_args()
    draw(values.run, values.picture)


if __name__ == "__main__":
    main()
