"""Reading a folder of small DICOM files as one series, as a worker does: its volumes, or the code of its refusal."""

from pathlib import Path
from typing import Any

from dinox_io.series import SeriesRules, read_series
from dinox_io.volume import Rejection, Volume

SERIES, PATIENT = "5" * 32, "a" * 32


def read(folder: Path, **rules: Any) -> tuple[list[Volume], list[Rejection]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return read_series(paths, series=SERIES, patient=PATIENT, rules=SeriesRules(**rules))


def volume_of(folder: Path, **rules: Any) -> Volume:
    volumes, rows = read(folder, **rules)
    assert len(volumes) == 1, rows
    return volumes[0]


def code_of(folder: Path, **rules: Any) -> str:
    volumes, rows = read(folder, **rules)
    assert not volumes
    assert [row.series for row in rows] == [SERIES]
    return rows[0].code
