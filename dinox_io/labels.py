"""Labels: the marks that readers made on series, one JSON object a line (docs/format.md, section Labels).

Invariant: a mark that was read or made is whole and bounded, and lies where it says: z in mm along the slice normal,
the axis of `z_positions_mm`; rows and columns as whole pixels of the stored slice. So a mark finds its slices by series
and z, whatever volumes the series was packed into.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.atomic import write_atomically
from dinox_io.canonical import canonical_json, parse_json_object
from dinox_io.errors import ShardError
from dinox_io.mask_runs import check_runs, decode_mask, encode_mask

LABELS_FOLDER = "labels"
MAX_LINE_BYTES, MAX_MARKS = 16 << 20, 1_000_000
MAX_MATRIX, MAX_RATINGS, MAX_TARGET = 1 << 16, 64, 1 << 53
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,89}")

_KEYS = frozenset({"series", "z_mm", "center", "box", "label", "reader", "target", "ratings", "mask"})
_MASK_KEYS = frozenset({"z_mm", "shape", "runs"})


class LabelError(ValueError):
    """Labels that cannot be read, or that do not fit the set; the message names the file and the line, or the mark."""


class LabelUsageError(LabelError):
    """A path, a name or a key was given that cannot be meant; nothing was read that could be damaged."""


@dataclass(frozen=True, kw_only=True)
class MarkMask:
    """The voxels of a mark: a bool array (slices, rows, columns) over its box, as run lengths."""

    z_mm: tuple[float, ...]
    """Position of each slice, ascending. Slices between them may be missing."""
    shape: tuple[int, int, int]
    """Slices, rows, columns: those of the box."""
    runs: tuple[int, ...]
    """See `dinox_io.mask_runs`."""

    def decode(self) -> np.ndarray:
        """bool (slices, rows, columns)."""
        return decode_mask(self.runs, self.shape)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What one reader marked in one series. LabelError, naming the member, where one of them is impossible."""

    series: str
    """Series pseudonym; before `of_set` gives it one, the SeriesInstanceUID."""
    z_mm: float
    """Position of its middle slice: of those it lies on, the one nearest to its centre."""
    center: tuple[float, float, float]
    """z in mm; row and column in pixels, fractions allowed: the centre of pixel (0, 0) is 0, 0."""
    box: tuple[float, int, int, float, int, int]
    """z of the first slice in mm, first row, first column; z of the last slice, last row + 1, last column + 1."""
    label: str
    reader: str
    """An id, never a name."""
    target: int
    """One value for all marks of one thing: which nodule it is."""
    ratings: Mapping[str, float]
    mask: MarkMask | None = None

    def __post_init__(self) -> None:
        for name, value in (("series", self.series), ("label", self.label), ("reader", self.reader)):
            _expect(isinstance(value, str) and WORD.fullmatch(value), f"{name} is not 1 to 90 letters, digits, . _ -")
        _expect(type(self.target) is int and abs(self.target) <= MAX_TARGET, "target is not a whole number")
        _expect(len(self.ratings) <= MAX_RATINGS, f"there are more than {MAX_RATINGS} ratings")
        for name, value in self.ratings.items():
            _expect(WORD.fullmatch(name) and _number(value), "ratings are not numbers with names")
        _check_place(self)
        if self.mask is not None:
            _check_mask(self.mask, self.box)

    def json(self) -> dict[str, Any]:
        """The object that stands in a line."""
        members = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        mask = self.mask
        return members | {
            "ratings": dict(self.ratings),
            "mask": mask and {"z_mm": mask.z_mm, "shape": mask.shape, "runs": mask.runs},
        }


def _expect(condition: object, problem: str) -> None:
    if not condition:
        raise LabelError(problem)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_TARGET  # type: ignore[arg-type]


def _check_place(mark: Mark) -> None:
    _expect(len(mark.box) == 6 and all(map(_number, mark.box)), "box is not 6 numbers")
    _expect(len(mark.center) == 3 and all(map(_number, mark.center)), "center is not 3 numbers")
    z, y, x, z_last, y_end, x_end = mark.box
    _expect(all(type(edge) is int for edge in (y, x, y_end, x_end)), "rows and columns of the box are not whole")
    _expect(0 <= y < y_end <= MAX_MATRIX and 0 <= x < x_end <= MAX_MATRIX and z <= z_last, "box is empty or impossible")
    _expect(_number(mark.z_mm) and z <= mark.z_mm <= z_last, "z_mm is not a position within the box")
    inside = z <= mark.center[0] <= z_last and y - 0.5 <= mark.center[1] <= y_end - 0.5
    _expect(inside and x - 0.5 <= mark.center[2] <= x_end - 0.5, "center is not within the box")


def _check_mask(mask: MarkMask, box: tuple[float, int, int, float, int, int]) -> None:
    z_mm = mask.z_mm
    _expect(z_mm and all(map(_number, z_mm)), "z_mm of the mask is no list of positions")
    _expect(all(a < b for a, b in pairwise(z_mm)), "z_mm of the mask does not ascend")
    _expect((z_mm[0], z_mm[-1]) == (box[0], box[3]), "the mask does not begin and end at the z of the box")
    _expect(mask.shape == (len(z_mm), box[4] - box[1], box[5] - box[2]), "the mask has not the shape of the box")
    try:
        check_runs(mask.runs, mask.shape)
    except ValueError as error:
        raise LabelError(f"mask: {error}") from None


def mark_of_mask(
    mask: np.ndarray,
    *,
    z_mm: Sequence[float],
    corner: tuple[int, int],
    series: str,
    label: str,
    reader: str,
    target: int,
    ratings: Mapping[str, float],
) -> Mark:
    """The mark of a bool array (slices, rows, columns), which becomes its box.

    Args:
        mask: its voxels. Where there are none (a reader's outline that encloses no pixel) the mark has its place only,
            and its centre is that of the box.
        z_mm: position of each slice, ascending, kept to a micrometre.
        corner: row and column of its first pixel in the stored slice.
        series, label, reader, target, ratings: see `Mark`.

    Raises:
        LabelError: one of these cannot be in a mark.
    """
    z = [round(float(position), 6) + 0.0 for position in z_mm]
    shape = (int(mask.shape[0]), int(mask.shape[1]), int(mask.shape[2]))
    voxels = np.argwhere(mask)
    if len(voxels):
        place = (np.array(z)[voxels[:, 0]].mean(), *(voxels[:, 1:].mean(axis=0) + corner))
    else:
        place = ((z[0] + z[-1]) / 2, corner[0] + (shape[1] - 1) / 2, corner[1] + (shape[2] - 1) / 2)
    center = (min(max(round(float(place[0]), 6), z[0]), z[-1]), round(float(place[1]), 3), round(float(place[2]), 3))
    return Mark(
        series=series,
        z_mm=min(z, key=lambda position: (abs(position - center[0]), position)),
        center=center,
        box=(z[0], *corner, z[-1], corner[0] + shape[1], corner[1] + shape[2]),
        label=label,
        reader=reader,
        target=target,
        ratings=dict(ratings),
        mask=MarkMask(z_mm=tuple(z), shape=shape, runs=encode_mask(mask)) if len(voxels) else None,
    )


# --- files -------------------------------------------------------------------------------------------------------


def label_path(folder: Path, name: str) -> Path:
    """OUT/labels/NAME.jsonl. LabelUsageError for a name that is none."""
    if not WORD.fullmatch(name):
        raise LabelUsageError(f"{name!r} cannot name labels: letters, digits, . _ -, at most 90")
    return folder / LABELS_FOLDER / f"{name}.jsonl"


def write_labels(path: Path, marks: Iterable[Mark]) -> None:
    """Write marks in one order, whatever theirs: by series, box, target, reader. Whole or not at all.

    Makes the folder. LabelError for more than 1,000,000 marks or a mark beyond 16 MiB; OSError of the disk.
    """
    lines = [canonical_json(mark.json()) + b"\n" for mark in sorted(marks, key=_order)]
    _expect(len(lines) <= MAX_MARKS, f"{len(lines)} marks are more than {MAX_MARKS}: write several files")
    _expect(all(len(line) <= MAX_LINE_BYTES for line in lines), f"a mark takes more than {MAX_LINE_BYTES} bytes")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, b"".join(lines))


def count_labels(path: Path) -> int | None:
    """How many marks a file of labels has; None if there is no such file. OSError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return None


def _order(mark: Mark) -> tuple[Any, ...]:
    return mark.series, mark.box, mark.target, mark.reader, mark.label, canonical_json(mark.json())


def read_labels(path: Path) -> list[Mark]:
    """The marks of a file, in its order.

    Raises:
        LabelError: a line is no mark (missing, unknown or impossible members), or too long, or there are too many;
            the message names file and line. OSError: the file cannot be read.
    """
    marks: list[Mark] = []
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            where = f"{path.name}: line {len(marks) + 1}"
            _expect(len(line) <= MAX_LINE_BYTES, f"{where} is longer than {MAX_LINE_BYTES} bytes")
            _expect(len(marks) < MAX_MARKS, f"{path.name} has more than {MAX_MARKS} marks")
            try:
                marks.append(_parse(parse_json_object(line, "it")))
            except (LabelError, ShardError) as error:
                raise LabelError(f"{where}: {error}") from None
    return marks


def _parse(members: dict[str, Any]) -> Mark:
    _same_keys(members, _KEYS, "a mark")
    mask = members["mask"]
    if mask is not None:
        _expect(isinstance(mask, dict), "mask is neither null nor an object")
        _same_keys(mask, _MASK_KEYS, "a mask")
        mask = MarkMask(**{name: _tuple(mask, name) for name in mask})
    _expect(isinstance(members["ratings"], dict), "ratings is not an object")
    return Mark(**members | {"center": _tuple(members, "center"), "box": _tuple(members, "box"), "mask": mask})


def _same_keys(members: Mapping[str, Any], keys: frozenset[str], what: str) -> None:
    for problem, names in (("misses", keys - members.keys()), ("does not have", members.keys() - keys)):
        _expect(not names, f"{what} {problem} {', '.join(sorted(names))[:200]}")


def _tuple(members: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    _expect(isinstance(members[name], list), f"{name} is not a list")
    return tuple(members[name])
