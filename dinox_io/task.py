"""What a worker does: one series read, checked against what the set has of it, and compressed.

Invariant: a task holds all that its outcome depends on, and whatever goes wrong is the outcome of that series alone.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dinox_io.discover import FoundSeries
from dinox_io.formats import READERS
from dinox_io.known import KnownVolume, what_changed
from dinox_io.rules import RULES, verdict
from dinox_io.series import SeriesRules
from dinox_io.shard import EncodedVolume, encode_volume
from dinox_io.volume import Rejection, Volume
from dinox_io.workers import TIMEOUT_S, Failure

_ANOTHER_TRY_MAY_DIFFER = frozenset({"FILE_UNREADABLE", "WORKER_CRASHED", "WORKER_MEMORY", "WORKER_TIMEOUT"})
_SAYS_NOTHING = _ANOTHER_TRY_MAY_DIFFER | {"DECODER_MISSING", "NIFTI_READER_MISSING", "INTERNAL_ERROR"}
"""Of a disk, a machine or an installation, not of the series: it may well be what it was."""


@dataclass(frozen=True, kw_only=True)
class SeriesTask:
    """One series, as a worker gets it."""

    paths: tuple[str, ...]
    size: int
    series: str
    patient: str
    patient_from: str
    identities: int
    rules: SeriesRules
    format: str = "dicom"
    given: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, KnownVolume]
    """Volume id -> what the set has of this series already."""
    encoding: tuple[str, int] = ("hilp", 1)
    """Filter, and level of zstd."""
    mark: str = ""
    """See journal.py; made before the files are read."""


@dataclass(frozen=True, kw_only=True)
class SeriesResult:
    """What a worker made of a series."""

    volumes: list[EncodedVolume] = field(default_factory=list)
    rows: list[Rejection] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether another try on the same files must give the same."""
        return not any(row.code in _ANOTHER_TRY_MAY_DIFFER for row in self.rows)


def series_task(
    found: FoundSeries, *, rules: SeriesRules, encoding: tuple[str, int], known: Mapping[str, KnownVolume]
) -> SeriesTask:
    """The task of a series that was found."""
    return SeriesTask(
        paths=tuple(file.path for file in found.files),
        size=found.size,
        series=found.series,
        patient=found.patient,
        patient_from=found.patient_from,
        identities=len(found.identities),
        rules=rules,
        format=found.format,
        given=found.given,
        known=known,
        encoding=encoding,
    )


def mark_of(task: SeriesTask) -> str:
    """A digest of all that the outcome depends on: the task, and path, size and time of change of each file."""
    files = [_file_mark(path) for path in task.paths]
    return hashlib.sha256(repr((replace(task, paths=(), mark=""), files)).encode()).hexdigest()


def sight_of(task: SeriesTask) -> str:
    """A digest of what this machine sees of the files of a task: the same on all that share their file system.

    Times in whole seconds: ways to mount one file system differ in what they keep of a second.
    """
    files = [(path, size, time_ns // 10**9) for path, size, time_ns in map(_file_mark, task.paths)]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _file_mark(path: str) -> tuple[str, int, int]:
    place = Path(path)
    while True:
        try:
            status = os.stat(place)  # noqa: PTH116
            return path, status.st_size, status.st_mtime_ns
        except NotADirectoryError:  # a member of an archive: the archive's size and time
            place = place.parent
        except OSError:
            return path, -1, -1


def pack_series(task: SeriesTask) -> SeriesResult:
    """Read and compress one series. Runs in a worker."""
    volumes, rows = _read(task)
    if task.known:
        return _compared(task, volumes, rows)
    for volume in volumes:
        volume.facts["patient_from"] = task.patient_from
    filter_name, level = task.encoding
    encoded = [encode_volume(volume, filter=filter_name, level=level) for volume in volumes]
    return SeriesResult(volumes=encoded, rows=rows)


def _read(task: SeriesTask) -> tuple[list[Volume], list[Rejection]]:
    if task.identities > 1:
        return [], _refused(task, "MIXED_PATIENTS", count=task.identities).rows
    try:
        paths = [Path(path) for path in task.paths]
        read = READERS[task.format]
        return read(paths, series=task.series, patient=task.patient, rules=task.rules, **task.given)
    except OSError:
        return [], _refused(task, "FILE_UNREADABLE").rows


def _compared(task: SeriesTask, volumes: list[Volume], rows: list[Rejection]) -> SeriesResult:
    """A series of the set adds nothing to it: it is what it was, or refused as changed."""
    codes = [row.code for row in rows if RULES[row.code].kind in ("rejected", "skipped")]
    if not volumes and _SAYS_NOTHING.issuperset(codes):
        return SeriesResult(rows=rows)
    change = what_changed(volumes, task.known) if volumes else f"now {', '.join(codes)}"
    return _refused(task, "SERIES_CHANGED", change=change) if change else SeriesResult(rows=rows)


def result_of(task: SeriesTask, outcome: Any) -> SeriesResult:
    """The outcome of a task as a result: what failed is a series refused."""
    if not isinstance(outcome, Failure):
        return outcome
    if outcome.kind == "error":
        return _refused(task, "INTERNAL_ERROR", error=outcome.error)
    if outcome.kind == "timeout":
        return _refused(task, "WORKER_TIMEOUT", seconds=TIMEOUT_S)
    return _refused(task, "WORKER_CRASHED" if outcome.kind == "crashed" else "WORKER_MEMORY")


def _refused(task: SeriesTask, code: str, **figures: float | int | str) -> SeriesResult:
    return SeriesResult(rows=[verdict(code, series=task.series, files=len(task.paths), **figures)])
