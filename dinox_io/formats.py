"""Which reader makes volumes of the files of a series, by the format in which they were found.

Invariant: every reader has the same signature and the same promise: volumes that are complete, ordered and in HU, or
the row that says why there is none; Refused is never let out, OSError means that a file cannot be read.
"""

from collections.abc import Callable

from dinox_io.series import read_series
from dinox_io.volume import Rejection, Volume

SeriesReader = Callable[..., tuple[list[Volume], list[Rejection]]]
"""(paths, *, series, patient, rules, **what FoundSeries.given holds): volumes, ascending, and rows of the report."""

READERS: dict[str, SeriesReader] = {"dicom": read_series}
