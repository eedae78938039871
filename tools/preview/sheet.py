"""The contact sheet of one volume: slices in three windows, reformats, a histogram, and what its record says.

Invariant: shows what the shards hold and nothing else; reads a volume once, some slices at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinox_io import ShardSet, VolumeRecord
from dinox_io.hounsfield import HISTOGRAM_BIN_HU, HU_MAX, HU_MIN, histogram
from preview.directions import Directions, directions, marked
from preview.page import BLUE, FAINT, ORANGE, Page
from preview.tiles import BONE, LUNG, SOFT_TISSUE, WIDE, fitted, gray, resized

SLICES = 16
"""Shown of a volume, in each window."""
COLUMNS, ROWS = 8, 2
"""At most. Fewer slices get larger tiles, so that rows are full."""
TILE, TILE_MAX, GAP, LABEL = 194, 394, 6, 17
MARGIN = 20
WIDTH = 2 * MARGIN + COLUMNS * TILE + (COLUMNS - 1) * GAP
REFORMATS = 690
"""Width of the box of both reformats."""
HEAD, HEADING = 62, 30
PANEL = 440
READ_SLICES = 16
HISTOGRAM_HU = (-1024, 3072)
TEXT_LINES = 24


@dataclass
class Reading:
    """What one pass over a volume keeps of it."""

    chosen: dict[int, np.ndarray]
    """z -> slice, shrunk: float32 HU."""
    coronal_hu: np.ndarray
    """int16 (z, x): the middle row of each slice."""
    sagittal_hu: np.ndarray
    """int16 (z, y): the middle column of each slice."""
    counts: np.ndarray
    """int64 (4096,): as hounsfield.histogram."""
    saturated: int
    """Voxels at the ends of int16."""


def draw_sheet(volume: VolumeRecord, facts: dict[str, Any], reading: Reading) -> Page:
    """The sheet of a volume, of its facts and what was read of it."""
    columns, width = layout(len(reading.chosen))
    height = max(len(tile) for tile in reading.chosen.values())
    block = HEADING + -(-len(reading.chosen) // columns) * (height + LABEL + GAP)
    marks = directions(volume.orientation, facts)
    page = Page(WIDTH, HEAD + 3 * block + PANEL + 2 * MARGIN)
    _head(page, volume, facts)
    y = HEAD
    for window in (LUNG, SOFT_TISSUE, BONE):
        page.text(MARGIN, y + 6, window.label, color=BLUE, bold=True)
        for number, (z, tile) in enumerate(reading.chosen.items()):
            row, column = divmod(number, columns)
            left, top = MARGIN + column * (width + GAP), y + HEADING + row * (height + LABEL + GAP)
            page.picture(left + (width - tile.shape[1]) // 2, top, marked(gray(tile, window), marks.axial))
            page.text(left, top + height + 3, f"z {z}   {volume.z_positions_mm[z]:.1f} mm", size=7, color=FAINT)
        y += block
    _reformats(page, y + MARGIN, volume, reading, marks)
    _histogram(page, y + MARGIN, reading)
    _facts(page, y + MARGIN, volume, facts)
    return page


def layout(slices: int) -> tuple[int, int]:
    """Columns, and width of a tile in pixels, that fill the page with so many slices."""
    rows = 1 if slices <= COLUMNS else ROWS
    columns = -(-slices // rows)
    return columns, min((WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns, TILE_MAX)


def shown_slices(depth: int, count: int = SLICES) -> list[int]:
    """Evenly spaced slice numbers, ascending, the ends a little off the ends of the volume; all if there are few."""
    if depth <= count:
        return list(range(depth))
    return [int((number + 0.5) * depth / count) for number in range(count)]


def read_volume(shards: ShardSet, volume: VolumeRecord) -> Reading:
    """One pass over a volume. Raises ShardError if it is damaged."""
    depth, rows, columns = volume.shape
    wanted = set(shown_slices(depth))
    _, width = layout(len(wanted))
    size = fitted((rows * volume.spacing_mm[1], columns * volume.spacing_mm[2]), (width, width))
    reading = Reading(
        {}, np.empty((depth, columns), np.int16), np.empty((depth, rows), np.int16), histogram(np.empty(0, np.int16)), 0
    )
    for start in range(0, depth, READ_SLICES):
        stop = min(start + READ_SLICES, depth)
        hu = shards.read(volume, start, stop)
        reading.coronal_hu[start:stop] = hu[:, rows // 2]
        reading.sagittal_hu[start:stop] = hu[:, :, columns // 2]
        reading.counts += histogram(hu)
        reading.saturated += int(np.count_nonzero((hu == HU_MIN) | (hu == HU_MAX)))
        for z in range(start, stop):
            if z in wanted:
                reading.chosen[z] = resized(hu[z - start], size)
    return reading


def _head(page: Page, volume: VolumeRecord, facts: dict[str, Any]) -> None:
    z, y, x = volume.shape
    dz, dy, dx = volume.spacing_mm
    first, last = volume.z_positions_mm[0], volume.z_positions_mm[-1]
    page.text(MARGIN, 12, volume.id, size=13, bold=True)
    page.text(
        MARGIN, 38,
        f"{z} x {y} x {x} (z, y, x)   ·   spacing {dz:g} x {dy:g} x {dx:g} mm   ·   z {first:.1f} to {last:.1f} mm"
        f"   ·   side: {volume.split}   ·   kernel: {short_value(facts.get('kernel'))}"
        f"   ·   kV: {short_value(facts.get('kvp'))}",
        color=FAINT,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the panel below


def _reformats(page: Page, y: int, volume: VolumeRecord, reading: Reading, marks: Directions) -> None:
    dz, dy, dx = volume.spacing_mm
    # Of a single slice the spacing may be unknown (0): it is drawn as thick as its pixels are high.
    height_mm = len(reading.coronal_hu) * (dz or dy)
    planes = (
        ("coronal", reading.coronal_hu, reading.coronal_hu.shape[1] * dx, marks.coronal),
        ("sagittal", reading.sagittal_hu, reading.sagittal_hu.shape[1] * dy, marks.sagittal),
    )
    box, step = reformat_boxes(height_mm, max(across_mm for _, _, across_mm, _ in planes))
    for number, (name, plane, across_mm, letters) in enumerate(planes):
        size = fitted((height_mm, across_mm), box)
        left, top = MARGIN + number * step[1], y + number * step[0]
        page.text(left, top, f"{name}, middle  (top: high z)", color=BLUE, bold=True)
        page.picture(left, top + HEADING, marked(gray(resized(plane[::-1], size), WIDE), letters))


def reformat_boxes(height_mm: float, across_mm: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The box (rows, columns) of each reformat, and the step (down, right) to the second: whichever shows more.

    A thick volume has them side by side, a thin one has its strips one below the other.
    """
    beside = (PANEL - HEADING, (REFORMATS - MARGIN) // 2)
    below = (PANEL // 2 - HEADING - MARGIN // 2, REFORMATS)
    if fitted((height_mm, across_mm), beside) >= fitted((height_mm, across_mm), below):
        return beside, (0, beside[1] + MARGIN)
    return below, (PANEL // 2, 0)


def _histogram(page: Page, y: int, reading: Reading) -> None:
    low, high = ((hu - HU_MIN) // HISTOGRAM_BIN_HU for hu in HISTOGRAM_HU)
    counts, total = reading.counts, int(reading.counts.sum())
    below, above = int(counts[:low].sum()), int(counts[high:].sum())
    axes = page.axes(MARGIN + 770, y + HEADING, 390, PANEL - HEADING - 105)
    bins = np.arange(low, high) * HISTOGRAM_BIN_HU + HU_MIN
    axes.fill_between(bins, np.maximum(counts[low:high], 0.5), 0.5, step="post", color=BLUE, linewidth=0)
    ends = [HISTOGRAM_HU[0] - 120, HISTOGRAM_HU[1] + 56]
    axes.bar(ends, [max(below, 0.5), max(above, 0.5)], width=64, align="edge", color=ORANGE)
    axes.set_yscale("log")
    axes.set_xlim(HISTOGRAM_HU[0] - 180, HISTOGRAM_HU[1] + 180)
    axes.set_ylim(0.5, 2 * max(counts.max(), 1))
    axes.set_xticks([-1000, 0, 1000, 2000, 3000])
    axes.minorticks_off()
    page.text(MARGIN + 720, y, "voxels by HU (log), orange: beyond the scale", color=BLUE, bold=True)
    last = HISTOGRAM_HU[1] - 1
    for line, (text, count) in enumerate(
        (
            (f"below {HISTOGRAM_HU[0]} HU", below),
            (f"above {last} HU", above),
            ("at the ends of int16", reading.saturated),
        )
    ):
        color = ORANGE if count and line == 2 else FAINT
        page.text(MARGIN + 770, y + PANEL - 70 + 19 * line, text, size=8.5, color=color)
        page.text(MARGIN + 930, y + PANEL - 70 + 19 * line, f"{count:,}  ({count / total:.2%})", size=8.5, color=color)


def _facts(page: Page, y: int, volume: VolumeRecord, facts: dict[str, Any]) -> None:
    left, lines = MARGIN + 1200, fact_lines(volume, facts)
    page.text(left, y, "record", color=BLUE, bold=True)
    if len(lines) > TEXT_LINES:
        lines[TEXT_LINES - 1 :] = [("…", f"{len(lines) - TEXT_LINES + 1} more in the record")]
    for number, (name, value) in enumerate(lines):
        page.text(left, y + HEADING + 17 * number, name, size=8, color=FAINT)
        page.text(left + 118, y + HEADING + 17 * number, value, size=8)


def fact_lines(volume: VolumeRecord, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the record says, as (name, value), both short."""
    directions = ", ".join(f"{cosine:.3g}" for cosine in volume.orientation[:6])
    size_mm = (f"{count * mm:.0f}" for count, mm in zip(volume.shape, volume.spacing_mm, strict=True))
    own = [
        ("patient", volume.patient), ("digest", volume.digest[:32]), ("directions x, y", directions),
        ("size", " x ".join(size_mm) + " mm"),
    ]  # fmt: skip
    return own + [(name[:20], short_value(value)) for name, value in sorted(facts.items())]


def short_value(value: Any) -> str:
    """A fact in a few characters; of one that differs between slices, its range or its first values."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        text = ", ".join(f"{name} {short_value(part)}" for name, part in value.items()) or "none"
    elif isinstance(value, list):
        text = _listed(value)
    else:
        text = str(value)
    return text if len(text) <= 36 else text[:35] + "…"


def _listed(values: Sequence[Any]) -> str:
    distinct = sorted({short_value(value) for value in values})
    if len(values) > 4 and distinct:
        return f"{len(distinct)} values: " + ", ".join(distinct)
    return ", ".join(short_value(value) for value in values) or "none"
