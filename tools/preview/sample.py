"""Pages of windows drawn at random from a whole set: what training sees, as slices and as one colour picture.

Invariant: which windows are drawn is a function of the set's digest and the seed; no volume comes twice before each
came once.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from dinox_io import ShardSet
from preview.directions import directions, marked
from preview.page import BLUE, FAINT, Page
from preview.tiles import WIDE, fitted, gray, resized

TILE, GAP, MARGIN = 200, 6, 20
ACROSS = 2
WINDOWS_A_PAGE = 20
CAPTION, HEAD = 44, 66
WIDTH = 2 * MARGIN + ACROSS * 4 * TILE + ACROSS * 3 * GAP + (ACROSS - 1) * 24


def drawn_windows(shards: ShardSet, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different (volume, z): one of each volume, a second of each, and so on; all if there are fewer."""

    def rank(*place: int) -> bytes:
        return hashlib.sha256(f"preview\0{seed}\0{place}\0{shards.digest}".encode()).digest()

    volumes = sorted(range(len(shards.volumes)), key=rank)
    drawn: list[tuple[int, int]] = []
    orders: dict[int, list[int]] = {}
    turn = 0
    while volumes and len(drawn) < count:
        for volume in volumes[: count - len(drawn)]:
            if volume not in orders:
                orders[volume] = sorted(range(shards.volumes[volume].shape[0]), key=lambda z, v=volume: rank(v, z))
            drawn.append((volume, orders[volume][turn]))
        turn += 1
        volumes = [volume for volume in volumes if shards.volumes[volume].shape[0] > turn]
    return drawn


def draw_samples(shards: ShardSet, count: int, seed: int) -> Iterator[tuple[str, Page]]:
    """The pages and their file names. Raises ShardError if a window is damaged."""
    windows = drawn_windows(shards, count, seed)
    pages = range(0, len(windows), WINDOWS_A_PAGE)
    for number, start in enumerate(pages, start=1):
        name, title = ("sample.png", "") if len(pages) == 1 else (f"sample-{number:02d}.png", f", page {number}")
        title = f"{len(windows)} windows of {len(shards.volumes)} volumes, seed {seed}{title}"
        yield name, _draw_page(shards, windows[start : start + WINDOWS_A_PAGE], title)


def _draw_page(shards: ShardSet, windows: Sequence[tuple[int, int]], title: str) -> Page:
    rows = -(-len(windows) // ACROSS)
    page = Page(WIDTH, HEAD + rows * (TILE + CAPTION) + MARGIN)
    page.text(MARGIN, 12, title, size=13, bold=True)
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
    marks = directions(volume.orientation, shards.facts(volume)).axial
    for place, pixels in enumerate((*(marked(pixels, marks) for pixels in slices), np.stack(slices, axis=-1))):
        x = left + place * (TILE + GAP) + (TILE - size[1]) // 2
        page.picture(x, top + (TILE - size[0]) // 2, pixels)
    page.text(left, top + TILE + 4, volume.id, size=8, color=BLUE)
    at_the_end = "   (at an end: one slice twice)" if z in (0, volume.shape[0] - 1) else ""
    page.text(
        left + 4 * TILE // 2, top + TILE + 4,
        f"z {z} of {volume.shape[0]}, {volume.z_positions_mm[z]:.1f} mm   ·   {volume.split}{at_the_end}",
        size=8, color=FAINT,
    )  # fmt: skip
