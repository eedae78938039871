"""A page of windows drawn at random from a whole set: what training sees, as slices and as one colour picture.

Invariant: which windows are drawn is a function of the set's digest and the seed.
"""

import hashlib

import numpy as np

from dinox_io import ShardSet
from preview.page import BLUE, FAINT, Page
from preview.tiles import WIDE, fitted, gray, resized

TILE, GAP, MARGIN = 200, 6, 20
ACROSS = 2
CAPTION, HEAD = 44, 66
WIDTH = 2 * MARGIN + ACROSS * 4 * TILE + ACROSS * 3 * GAP + (ACROSS - 1) * 24


def drawn_windows(shards: ShardSet, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different (volume, z) of the whole set, all equally likely; all windows if it has fewer."""
    ends = np.cumsum([volume.shape[0] for volume in shards.volumes])
    total = int(ends[-1])
    drawn: dict[int, None] = {}
    turn = 0
    while len(drawn) < min(count, total):
        digest = hashlib.sha256(f"preview\0{seed}\0{turn}\0{shards.digest}".encode()).digest()
        drawn[int.from_bytes(digest[:16], "big") % total] = None
        turn += 1
    places = [int(np.searchsorted(ends, slice_number, side="right")) for slice_number in drawn]
    return [(v, s - int(ends[v]) + shards.volumes[v].shape[0]) for v, s in zip(places, drawn, strict=True)]


def draw_sample(shards: ShardSet, count: int, seed: int) -> Page:
    """The page. Raises ShardError if a window is damaged."""
    windows = drawn_windows(shards, count, seed)
    rows = -(-len(windows) // ACROSS)
    page = Page(WIDTH, HEAD + rows * (TILE + CAPTION) + MARGIN)
    page.text(MARGIN, 12, f"{len(windows)} windows of {len(shards.volumes)} volumes, seed {seed}", size=13, bold=True)
    page.text(
        MARGIN, 38,
        f"slices z-1, z, z+1 in {WIDE.label}, and the three as red, green, blue: still anatomy is grey, coloured edges "
        "are what changes between slices",
        color=FAINT,
    )  # fmt: skip
    for number, (volume, z) in enumerate(windows):
        row, column = divmod(number, ACROSS)
        left = MARGIN + column * (4 * TILE + 3 * GAP + 24)
        _window(page, left, HEAD + row * (TILE + CAPTION), shards, volume, z)
    return page


def _window(page: Page, left: int, top: int, shards: ShardSet, number: int, z: int) -> None:
    volume = shards.volumes[number]
    hu = shards.read_window(volume, center=z, depth=3, step=1)
    _, rows, columns = volume.shape
    size = fitted((rows * volume.spacing_mm[1], columns * volume.spacing_mm[2]), (TILE, TILE))
    slices = [gray(resized(slice_hu, size), WIDE) for slice_hu in hu]
    for place, pixels in enumerate((*slices, np.stack(slices, axis=-1))):
        x = left + place * (TILE + GAP) + (TILE - size[1]) // 2
        page.picture(x, top + (TILE - size[0]) // 2, pixels)
    page.text(left, top + TILE + 4, volume.id, size=8, color=BLUE)
    at_the_end = "   (at an end: one slice twice)" if z in (0, volume.shape[0] - 1) else ""
    page.text(
        left + 4 * TILE // 2, top + TILE + 4,
        f"z {z} of {volume.shape[0]}, {volume.z_positions_mm[z]:.1f} mm   ·   {volume.split}{at_the_end}",
        size=8, color=FAINT,
    )  # fmt: skip
