"""The index table of a PNG set (CSV, in the layout of DINO-X): which pictures are which slices of which series.

Columns: png_path, series_dir, slice_index, encoding, and mostly spacing_x, spacing_y, spacing_z, dataset. The encoding
is not read: the writer's two encodings bear the same name there.

Invariant: nothing is guessed that could put one patient on both sides of a split or a slice at the wrong height. A row
that cannot be understood refuses the table; messages name lines, never paths (they hold names of patients).
"""

import csv
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dinox_io.dicom import Identity
from dinox_io.discover import FoundFile, FoundSeries
from dinox_io.output import PackError
from dinox_io.png16 import ENCODINGS, SPACING_MAX_MM, Spacing, other_encoding, stored_range
from dinox_io.privacy import pseudonym
from dinox_io.workers import Failure, WorkerPool

TABLE_BYTES_MAX = 4 << 30
SLICE_INDEX_MAX = 1_000_000
SAMPLED_SERIES = 16
_NEEDED = ("png_path", "series_dir", "slice_index")
_SPACING = ("spacing_x", "spacing_y", "spacing_z")
_PLACEHOLDER = (1.0, 1.0, 1.0)
"""What the writer puts where it knows no spacing."""
_LIDC = re.compile(r"(?<![A-Za-z0-9])LIDC-IDRI-\d{4}(?!\d)")


@dataclass(kw_only=True)
class IndexedSeries:
    """The rows of one series_dir."""

    series_dir: str
    line: int
    """Of its first row."""
    slices: dict[str, int] = field(default_factory=dict)
    """Absolute path of each picture -> its slice number."""
    spacings_mm: set[Spacing] = field(default_factory=set)
    unspaced: int = 0
    """Rows without a spacing."""
    conflicts: set[str] = field(default_factory=set)
    """Pictures that stand under another slice number or series as well."""


@dataclass(kw_only=True)
class IndexTable:
    """A table that was read."""

    path: Path
    series: list[IndexedSeries]
    repeated_rows: int
    """Rows that say the same as an earlier one: the writer samples by writing rows twice."""


# ---------------------------------------------------------------------------------------------- reading


def read_index(path: Path, root: Path | None = None) -> IndexTable:
    """Read a table; its pictures are looked for under `root`.

    Of a png_path, the longest tail of folders that exists under `root` counts, so that a tree may have moved. Without
    `root`, an absolute png_path is taken as it stands if its folder exists; else the table's own folder and the one
    above it are the roots.

    Raises:
        PackError: it cannot be read, lacks columns, or a row makes no sense.
    """
    if root is not None and not root.is_dir():
        raise PackError(f"--root {root} " + ("is no folder" if root.exists() else "does not exist"))
    places = _Places([root] if root else [path.parent, path.parent.parent], as_they_stand=root is None)
    series: dict[str, IndexedSeries] = {}
    seen: dict[str, tuple[str, int]] = {}
    repeated = 0
    for line, row in _rows(path):
        where = f"{path.name}: line {line}"
        name = row["series_dir"]
        index = _slice_number(row["slice_index"], where)
        picture = places.of(row["png_path"], where)
        one = series.setdefault(name, IndexedSeries(series_dir=name, line=line))
        before = seen.setdefault(picture, (name, index))
        if picture in one.slices and before == (name, index):
            repeated += 1
            continue
        if before != (name, index):
            one.conflicts.add(picture)
            series[before[0]].conflicts.add(picture)
        one.slices.setdefault(picture, index)
        spacing = _spacing(row, name)
        if spacing is None:
            one.unspaced += 1
        else:
            one.spacings_mm.add(spacing)
    if not series:
        raise PackError(f"{path.name} lists no picture")
    return IndexTable(path=path, series=list(series.values()), repeated_rows=repeated)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a table, with what is needed in every row."""
    try:
        if not path.is_file():
            raise PackError(f"there is no table {path}")
        if path.stat().st_size > TABLE_BYTES_MAX:
            raise PackError(f"{path.name} is larger than {TABLE_BYTES_MAX >> 30} GiB: no index table")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise PackError(f"{path.name} has no column {', '.join(missing)}: it is no index table of DINO-X")
            for row in reader:
                if None in row or not all(row[name] for name in _NEEDED):
                    raise PackError(f"{path.name}: line {reader.line_num} lacks {', '.join(_NEEDED)} or has more cells")
                yield reader.line_num, row
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PackError(f"{path.name} is no UTF-8 text") from None
    except csv.Error as error:
        raise PackError(f"{path.name} is no CSV table ({error})") from None


def _slice_number(text: str, where: str) -> int:
    if not re.fullmatch(r"\s*\d{1,7}\s*", text, re.ASCII) or int(text) > SLICE_INDEX_MAX:
        raise PackError(f"{where}: slice_index is no whole number from 0 to {SLICE_INDEX_MAX}")
    return int(text)


def _spacing(row: dict[str, str], series_dir: str) -> Spacing | None:
    """(z, y, x) in mm, or None where the row gives none that a CT can have, or the writer's placeholder."""
    try:
        x, y, z = (float(row.get(name) or "nan") for name in _SPACING)
    except ValueError:
        return None
    if (x, y, z) == _PLACEHOLDER or not all(math.isfinite(v) and 0 < v <= SPACING_MAX_MM for v in (x, y, z)):
        return None
    # The writer took DICOM's PixelSpacing as (x, y), but its first value is between rows: y. From NIfTI it wrote x, y;
    # those series are named by a file, not by a folder.
    return (z, x, y) if _separated(series_dir) else (z, y, x)


def _separated(path: str) -> bool:
    return "/" in path or "\\" in path


class _Places:
    """Where the folders of pictures are now; each is looked for once."""

    def __init__(self, roots: Sequence[Path], *, as_they_stand: bool) -> None:
        self._roots = [os.path.abspath(root) for root in roots]  # noqa: PTH100 (resolve() would follow links)
        self._as_they_stand = as_they_stand
        self._known: dict[str, str] = {}

    def of(self, png_path: str, where: str) -> str:
        """Absolute path of a picture; of one that is nowhere, where it was looked for."""
        path = png_path if "/" in png_path else png_path.replace("\\", "/")
        folder, _, name = path.rpartition("/")
        if "\0" in path or name in ("", ".", "..") or ".." in folder.split("/"):
            raise PackError(f"{where}: png_path is no path of a file below a folder")
        if folder not in self._known:
            self._known[folder] = self._look_for(folder)
        return os.path.join(self._known[folder], name)  # noqa: PTH118 (string paths: a million of them)

    def _look_for(self, folder: str) -> str:
        if self._as_they_stand and folder.startswith("/") and Path(folder).is_dir():
            return folder
        parts = [part for part in folder.split("/") if part not in ("", ".")]
        for root in self._roots:
            for start in range(max(len(parts), 1)):
                place = Path(root, *parts[start:])
                if place.is_dir():
                    return str(place)
        return str(Path(self._roots[0], *parts))


def check_present(table: IndexTable) -> None:
    """PackError if none of the pictures is there. (A series that lacks some is refused when it is read.)"""
    if not any(os.path.exists(path) for one in table.series for path in one.slices):  # noqa: PTH110
        raise PackError(
            f"none of the {sum(len(one.slices) for one in table.series)} pictures that {table.path.name} lists is "
            "there: say with --root which folder they are in now"
        )


# ---------------------------------------------------------------------------------------------- patients


def patients_of(table: IndexTable, pattern: str | None = None) -> list[str]:
    """Who each series is of, by its series_dir: the first group of `pattern` where it matches, or the whole match.

    Without a pattern only LIDC-IDRI is known: its PatientIDs stand in the path.

    Raises:
        PackError: the pattern is none, or does not match every series.
    """
    try:
        search = re.compile(pattern) if pattern is not None else _LIDC
    except re.error as error:
        raise PackError(f"--patient-from is no regular expression: {error}") from None
    patients = [_patient(search, one.series_dir, alone=pattern is None) for one in table.series]
    unknown = [one.line for one, patient in zip(table.series, patients, strict=True) if not patient]
    if unknown:
        said = "names no LIDC-IDRI patient" if pattern is None else "is not matched by --patient-from"
        raise PackError(
            f"{table.path.name}: the series_dir of {len(unknown)} of {len(patients)} series, the first on line "
            f"{unknown[0]}, {said}. Say with --patient-from REGEX what in it tells patients apart ('.+' only where "
            "each series is of another patient): guessed wrong, a patient is trained on and validated on"
        )
    return [patient or "" for patient in patients]


def _patient(search: re.Pattern[str], series_dir: str, *, alone: bool) -> str | None:
    matches = list(search.finditer(series_dir))
    if not matches or (alone and len({match.group() for match in matches}) > 1):
        return None
    return matches[0].group(1) if search.groups else matches[0].group()


# ---------------------------------------------------------------------------------------------- the encoding


def check_encoding(table: IndexTable, encoding: str, pool: WorkerPool) -> None:
    """Look at one picture of some series: PackError if not one of them can have been written with this encoding.

    Where only some contradict it, those series are refused when they are read.
    """
    step = max(1, len(table.series) // SAMPLED_SERIES)
    chosen = [sorted(one.slices, key=lambda path: one.slices[path]) for one in table.series[::step]]
    middles = [paths[len(paths) // 2] for paths in chosen]
    outcomes = [outcome for _, outcome in pool.map(stored_range, middles)]
    ranges = [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, Failure)]
    if ranges and all(ENCODINGS[encoding].refuted_by(low, high) for low, high in ranges):
        low, high = (ENCODINGS[encoding].hu_of(value) for value in ranges[0])
        other = other_encoding(encoding)
        fits = not any(ENCODINGS[other].refuted_by(*found) for found in ranges)
        hint = f"--encoding {other} fits them" if fits else f"nor can they be {other}: the pictures hold no such HU"
        raise PackError(
            f"the pictures are not stored as {encoding}: read so, the first of {len(ranges)} that were looked at goes "
            f"from {low:.1f} to {high:.1f} HU; {hint}"
        )


# ---------------------------------------------------------------------------------------------- series


def found_series(
    table: IndexTable, patients: Sequence[str], *, encoding: str, spacing_mm: Spacing | None, key: bytes
) -> list[FoundSeries]:
    """The series as the packer takes them, in its order. `spacing_mm` (z, y, x) is for rows that have none.

    A patient's pseudonym is that of the PatientID of the same text, so that sets of one key agree. A series' is its
    own: heights are assumed here, and marks made on the DICOM series must not be put at them.
    """
    found = [
        _found(one, patient, encoding, spacing_mm, key) for one, patient in zip(table.series, patients, strict=True)
    ]
    return sorted(found, key=lambda series: (series.patient, series.series))


def _found(
    one: IndexedSeries, patient: str, encoding: str, spacing_mm: Spacing | None, key: bytes
) -> FoundSeries:  # fmt: skip
    paths = sorted(one.slices)
    filled = one.unspaced > 0 and spacing_mm is not None
    spacings = one.spacings_mm | ({spacing_mm} if spacing_mm is not None and filled else set())
    return FoundSeries(
        series=pseudonym(key, "series", f"png16 {one.series_dir}"),
        patient=pseudonym(key, "patient", f"{patient}\0"),
        patient_from="series_dir",
        identities={(patient, "")},
        identity=Identity(patient_id=patient, issuer="", study_uid="", series_uid=one.series_dir, likeness=""),
        format="png16",
        given={
            "encoding": encoding,
            "indices": tuple(one.slices[path] for path in paths),
            "spacings_mm": tuple(sorted(spacings)),
            "spacing_from": "given" if filled else "index",
            "unspaced": 0 if filled else one.unspaced,
            "conflicts": len(one.conflicts),
        },
        files=[FoundFile(path, _size(path)) for path in paths],
    )


def _size(path: str) -> int:
    """Bytes of a picture; -1 if it is not there."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except (OSError, ValueError):
        return -1
