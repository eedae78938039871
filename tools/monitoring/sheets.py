"""The monitor's pictures: attention and patch colours of the fixed slices, of one checkpoint and over time.

Invariant: a function of the arrays handed in; nothing here knows of patients, volumes or paths of a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from dinox_train.pictures import save_sheet
from monitoring.features import Attention

Item = TypeVar("Item")
TILE_INCHES = 1.35
COLUMNS_OVER_TIME = 8
_LEVELS = (0.0, 0.35, 0.65, 0.85, 1.0)
_COLOURS = ((11, 13, 18), (91, 42, 134), (212, 85, 63), (246, 176, 78), (253, 246, 216))
"""From nothing to the most, dark to light, so that a gray print keeps the order."""


@dataclass(frozen=True)
class Maps:
    """What a checkpoint made of the fixed slices, small enough to be kept of each."""

    update: int
    attention: np.ndarray
    """float32 (s, h, w): of the last block, mean over heads."""
    colours: np.ndarray
    """uint8 (s, h, w, 3)."""


def heat(values: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3) in [0, 1] of values (h, w) from 0 to their largest."""
    most = float(values.max())
    shares = values / most if most > 0 else np.zeros_like(values)
    columns = [np.interp(shares, _LEVELS, [colour[n] for colour in _COLOURS]) for n in range(3)]
    return np.stack(columns, axis=-1) / 255


def save_attention(path: Path, slices: Sequence[np.ndarray], found: Sequence[Attention], whose: str) -> None:
    """A row a slice: the slice (side, side) in [0, 1], the mean over heads, each head, each register.

    Each tile is from 0 to its own largest weight, which stands above it beside the share that all patches get.
    """
    lines, texts = [], []
    for gray, attention in zip(slices, found, strict=True):
        maps = [attention.heads.mean(axis=0), *attention.heads, *attention.registers]
        lines.append([gray, *(heat(one) for one in maps)])
        texts.append(["", *(f"most {100 * one.max():.2g} %\nall {100 * one.sum():.0f} %" for one in maps)])
    heads, registers = len(found[0].heads), len(found[0].registers)
    names = ["slice", f"{whose}, mean", *(f"head {1 + n}" for n in range(heads))]
    save_sheet(path, lines, [*names, *(f"register {1 + n}" for n in range(registers))], texts, tile_inches=TILE_INCHES)


def save_colours(path: Path, slices: Sequence[np.ndarray], colours: np.ndarray) -> None:
    """A row a slice: the slice, and its patches' colours, uint8 (s, h, w, 3)."""
    lines = [[gray, one / 255] for gray, one in zip(slices, colours, strict=True)]
    save_sheet(path, lines, ["slice", "its patch features"], tile_inches=2 * TILE_INCHES)


def save_attention_over_time(path: Path, slices: Sequence[np.ndarray], looks: Sequence[Maps]) -> None:
    """A row a slice: the slice, then its attention in each look."""
    lines = [[gray, *(heat(look.attention[row]) for look in looks)] for row, gray in enumerate(slices)]
    texts = [["", *(f"most {100 * look.attention[row].max():.2g} %" for look in looks)] for row in range(len(slices))]
    save_sheet(path, lines, _columns(looks), texts, tile_inches=TILE_INCHES)


def save_colours_over_time(path: Path, slices: Sequence[np.ndarray], looks: Sequence[Maps]) -> None:
    """A row a slice: the slice, then its patches' colours in each look."""
    lines = [[gray, *(look.colours[row] / 255 for look in looks)] for row, gray in enumerate(slices)]
    save_sheet(path, lines, _columns(looks), tile_inches=TILE_INCHES)


def spread(items: Sequence[Item]) -> list[Item]:
    """At most 8 of them, evenly, the first and the last among them: as many as a picture over time has columns."""
    if len(items) <= COLUMNS_OVER_TIME:
        return list(items)
    numbers = np.rint(np.linspace(0, len(items) - 1, COLUMNS_OVER_TIME)).astype(int)
    return [items[number] for number in numbers]


def _columns(looks: Sequence[Maps]) -> list[str]:
    return ["slice", *(f"update {look.update}" for look in looks)]
