"""The page index.html: a row for each volume with a link to its sheet, those that are unlike the others first.

Invariant: one file without scripts or anything from elsewhere; every text is escaped; the same volumes give the same
bytes.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import quote

from dinox_io import VolumeRecord
from dinox_io.atomic import write_atomically

PERCENTILES = (1, 50, 99)
_SPACING_STEP, _HU_STEP = 0.1, 60.0
"""What counts as little: 10 per cent of a spacing, 60 HU."""
_UNLIKE = 4.0
"""A volume is marked from this score on."""
_STYLE = (
    "body{background:#101418;color:#e8ecf0;font:14px sans-serif;margin:2em}a{color:#6fa8dc}td,th{text-align:left;"
    "padding:.3em 1em .3em 0;border-bottom:1px solid #2a323a;white-space:nowrap}.bad{color:#e69f5b}"
)
_HEADINGS = ("volume", "slices, rows, columns", "spacing mm (z, y, x)", "HU 1 / 50 / 99 %", "side", "kernel", "kV", "")


@dataclass(frozen=True)
class Row:
    """A volume that was drawn."""

    volume: VolumeRecord
    hu: tuple[int, int, int]
    """HU below which 1, 50 and 99 per cent of the voxels lie."""
    kernel: str
    kvp: str


def write_listing(path: Path, rows: Sequence[Row], damaged: Mapping[str, str]) -> None:
    """Write the page. `damaged`: id of a volume that could not be drawn -> why. Raises OSError."""
    scores = outlier_scores(rows)
    order = sorted(range(len(rows)), key=lambda number: (-scores[number], rows[number].volume.index))
    lines = [_damaged_line(volume, why) for volume, why in damaged.items()]
    lines += [_line(rows[number], scores[number]) for number in order]
    heads = "".join(f"<th>{text}</th>" for text in _HEADINGS)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{len(rows)} volumes</title>'
        f"<style>{_STYLE}</style></head><body><h1>{len(rows)} volumes</h1>\n"
        "<p>Those whose spacing or HU are least like the others come first.</p>\n"
        f"<table><tr>{heads}</tr>\n" + "\n".join(lines) + "\n</table></body></html>\n"
    )
    write_atomically(path, page.encode())


def outlier_scores(rows: Sequence[Row]) -> list[float]:
    """How far each volume is from the middle of all: the largest distance of its figures, in spreads of each figure."""
    figures = [
        [math.log(max(mm, 1e-3)) / _SPACING_STEP for mm in row.volume.spacing_mm] + [hu / _HU_STEP for hu in row.hu]
        for row in rows
    ]
    scores = [0.0] * len(rows)
    for column in zip(*figures, strict=True):
        middle = median(column)
        # The median distance is the spread that a few odd volumes cannot widen.
        spread = max(1.0, median(abs(value - middle) for value in column))
        scores = [max(score, abs(value - middle) / spread) for score, value in zip(scores, column, strict=True)]
    return [round(score, 2) for score in scores]


def _line(row: Row, score: float) -> str:
    volume = row.volume
    cells = [
        " x ".join(map(str, volume.shape)),
        " x ".join(f"{mm:g}" for mm in volume.spacing_mm),
        " / ".join(map(str, row.hu)),
        volume.split,
        row.kernel,
        row.kvp,
        "unlike the others" if score >= _UNLIKE else "",
    ]
    link = f'<a href="{quote(volume.id)}.png">{html.escape(volume.id)}</a>'
    style = ' class="bad"' if score >= _UNLIKE else ""
    return f"<tr{style}><td>{link}</td>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _damaged_line(volume: str, why: str) -> str:
    return f'<tr class="bad"><td>{html.escape(volume)}</td><td colspan="7">DAMAGED: {html.escape(why)}</td></tr>'
