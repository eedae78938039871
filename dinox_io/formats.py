"""Which reader makes volumes of the files of a series, by the format in which they were found.

Invariant: every reader has the same signature and the same promise: volumes that are complete, ordered and in HU, or
the row that says why there is none; Refused is never let out, OSError means that a file cannot be read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dinox_io.nifti import read_nifti
from dinox_io.png16 import read_png16
from dinox_io.rules import verdict
from dinox_io.series import read_series
from dinox_io.volume import Rejection, Volume

SeriesReader = Callable[..., tuple[list[Volume], list[Rejection]]]
"""(paths, *, series, patient, rules, **what FoundSeries.given holds): volumes, ascending, and rows of the report."""


def not_ct(paths: Sequence[Path], *, series: str, **_: Any) -> tuple[list[Volume], list[Rejection]]:
    """The row of a series in which no file is CT, as the headers that were scanned say; nothing is opened again."""
    return [], [verdict("NOT_CT", series=series, files=len(paths))]


READERS: dict[str, SeriesReader] = {
    "dicom": read_series,
    "nifti": read_nifti,
    "not_ct": not_ct,
    "png16": read_png16,
}
