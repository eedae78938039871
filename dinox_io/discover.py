"""Finds the files to pack, on disk and in zip archives, and groups them into series.

Invariant: each file that is there is counted once, whatever links or overlapping inputs lead to it, and what comes out
depends on the files, not on the order in which a disk lists them. Only headers are read.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dinox_io import archive, dicom, nifti
from dinox_io.archive import ArchiveError, open_binary
from dinox_io.elements import HEAD_BYTES
from dinox_io.fileformat import NotDicom
from dinox_io.image import Identity
from dinox_io.privacy import pseudonym


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file by its absolute path, and its size in bytes."""

    path: str
    size: int
    top: str = ""
    """The input that it was found under."""
    archive: "FoundFile | None" = None
    """The zip archive that it lies in; see archive.py for its path."""


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """What a file is: the identity of an image, the code (see rules.py) by which it is none, or an archive."""

    file: FoundFile
    identity: Identity | None
    code: str | None
    members: tuple[FoundFile, ...] = ()
    """Of an archive: the files to scan in its place."""


@dataclass(kw_only=True)
class FoundSeries:
    """The files of one series, sorted by path."""

    series: str
    """Pseudonym."""
    patient: str
    """Pseudonym."""
    patient_from: str
    """The attribute that the patient's pseudonym was made of."""
    identities: set[tuple[str, str]]
    """Distinct (PatientID, IssuerOfPatientID): more than one is refused."""
    identity: Identity
    format: str = "dicom"
    """Which reader of formats.py makes volumes of it."""
    given: dict[str, Any] = field(default_factory=dict)
    """What that reader must know beside the files: its keyword arguments."""
    files: list[FoundFile] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


def walk(inputs: Sequence[Path], *, without: Path) -> Iterator[FoundFile]:
    """Every regular file under the inputs (files or folders), sorted, each once; `without` is a folder to leave out.

    Links are followed; a folder that was seen already (a loop, an overlap of inputs) is not entered again. A file or
    folder that cannot be looked at is yielded with size -1.
    """
    seen: set[tuple[int, int]] = set()
    if without.exists():
        seen.add(_identity_on_disk(without.stat()))
    for item in sorted({os.path.abspath(path) for path in inputs}):  # noqa: PTH100 (resolve() would follow links)
        yield from _walk(item, seen)


def _identity_on_disk(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _walk(top: str, seen: set[tuple[int, int]]) -> Iterator[FoundFile]:
    pending = [top]
    while pending:
        path = pending.pop()
        try:
            status = os.stat(path)  # noqa: PTH116 (string paths: a million of them)
            if _identity_on_disk(status) in seen:
                continue
            seen.add(_identity_on_disk(status))
            if stat.S_ISDIR(status.st_mode):
                pending += [os.path.join(path, name) for name in _names(path)]  # noqa: PTH118
            elif stat.S_ISREG(status.st_mode):
                yield FoundFile(path, status.st_size, top)
        except OSError:
            yield FoundFile(path, -1, top)


def _names(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted((entry.name for entry in entries), reverse=True)


def scan(files: Sequence[FoundFile]) -> list[ScannedFile]:
    """Read the headers of some files; archives are listed. Runs in a worker process: a file is untrusted."""
    return [_scan_one(file) for file in files]


def _scan_one(file: FoundFile) -> ScannedFile:
    if file.size < 0:
        return ScannedFile(file, None, "FILE_UNREADABLE")
    try:
        with open_binary(file.path) as stream:
            return _recognised(file, stream, stream.read(HEAD_BYTES))
    except NotDicom as answer:
        members = _behind_others(file) if answer.code == "NOT_DICOM" else ()
        return ScannedFile(file, None, None if members else answer.code, members)
    except ArchiveError as answer:
        return ScannedFile(file, None, answer.code)
    except OSError:
        return ScannedFile(file, None, "FILE_UNREADABLE")


def _recognised(file: FoundFile, stream: BinaryIO, head: bytes) -> ScannedFile:
    """By content, never by name."""
    if head[128:132] == b"DICM":
        return ScannedFile(file, dicom.identify(stream, head), None)
    if archive.is_zip(head):
        return _archive(file, head)
    kind = nifti.recognise(head)
    if kind == "nifti":
        return ScannedFile(file, nifti.identify(stream, head, file.path, file.top), None)
    if kind is not None or archive.is_other(head):
        return ScannedFile(file, None, kind or "ARCHIVE_UNSUPPORTED")
    return ScannedFile(file, dicom.identify(stream, head), None)


def _archive(file: FoundFile, head: bytes) -> ScannedFile:
    if file.archive is not None:
        return ScannedFile(file, None, "NOT_DICOM" if archive.is_office(head) else "ARCHIVE_UNSUPPORTED")
    members = _members(file)
    return ScannedFile(file, None, None if members else "NOT_DICOM", members)


def _members(file: FoundFile) -> tuple[FoundFile, ...]:
    return tuple(FoundFile(path, size, file.top, file) for path, size in archive.members(file.path))


def _behind_others(file: FoundFile) -> tuple[FoundFile, ...]:
    """What lies in a zip archive that follows other bytes, as in one that extracts itself; () if there is none."""
    if file.archive is not None:  # its end is there only when all of it has been inflated
        return ()
    try:
        return _members(file) if archive.ends_as_zip(file.path) else ()
    except OSError:  # programs hold the signatures of archives without being any
        return ()


class Grouper:
    """Collects scanned files into series; `result` sorts them by pseudonym."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._groups: dict[tuple[str, ...], list[FoundFile]] = {}
        self._identities: dict[tuple[str, ...], set[tuple[str, str]]] = {}
        self._first: dict[tuple[str, ...], Identity] = {}
        self._with_ct: set[tuple[str, ...]] = set()
        self._foreign: list[tuple[str, FoundFile]] = []
        self._archives: set[str] = set()
        """Those in which there is anything but foreign files."""

    def add(self, scanned: ScannedFile) -> None:
        """Put one file where it belongs; of an archive, its members are to be added, not itself (ValueError)."""
        if scanned.members:
            raise ValueError("an archive was added, not the files in it")
        identity, holder = scanned.identity, scanned.file.archive
        if holder is not None and scanned.code != "NOT_DICOM":
            self._archives.add(holder.path)
        if identity is None:
            self._foreign.append((scanned.code or "DICOM_DAMAGED", scanned.file))
            return
        group = _group_key(identity, scanned.file.path)
        self._groups.setdefault(group, []).append(scanned.file)
        self._identities.setdefault(group, set()).add((identity.patient_id, identity.issuer))
        if identity.is_ct:
            self._with_ct.add(group)
        # The least one, not the first: names of files must not matter.
        self._first[group] = min(
            self._first.get(group, identity),
            identity,
            key=lambda one: (one.study_uid, one.issuer, one.patient_from),
        )

    @property
    def foreign(self) -> list[tuple[str, FoundFile]]:
        """(code, file) of files that belong to no series; an archive that holds no others stands for them."""
        found: dict[str, tuple[str, FoundFile]] = {}
        for code, file in self._foreign:
            whole = file.archive if file.archive and file.archive.path not in self._archives else file
            found[whole.path] = code, whole
        return list(found.values())

    def result(self) -> list[FoundSeries]:
        """The series, by (patient, series) pseudonym: a patient's volumes lie together in the shards."""
        found: dict[str, FoundSeries] = {}
        for group, files in self._groups.items():
            files.sort(key=lambda file: file.path)
            series = self._series(group, files)
            if series.series in found:  # the same files without a UID, in two folders
                found[series.series].files += series.files
            else:
                found[series.series] = series
        for series in found.values():
            series.files.sort(key=lambda file: file.path)
        return sorted(found.values(), key=lambda series: (series.patient, series.series))

    def _series(self, group: tuple[str, ...], files: list[FoundFile]) -> FoundSeries:
        identity = self._first[group]
        # A series without a UID is named by what it holds: moving its folder must not make another series of it.
        name = identity.series_uid or "content " + _content_digest(files)
        identities = self._identities[group]
        patient_id, issuer = min(identities)
        if patient_id:
            value, origin = f"{patient_id}\0{issuer}", identity.patient_from
        elif identity.study_uid:
            value, origin = identity.study_uid, "StudyInstanceUID"
        else:
            value, origin = name, "SeriesInstanceUID" if identity.series_uid else "content"
        return FoundSeries(
            series=pseudonym(self._key, "series", name),
            patient=pseudonym(self._key, "patient", value),
            patient_from=origin,
            identities=identities,
            identity=identity,
            # Of what is no CT the header was read once, and that is enough.
            format=identity.format if group in self._with_ct else "not_ct",
            files=files,
        )


def _group_key(identity: Identity, path: str) -> tuple[str, ...]:
    if identity.series_uid:
        return identity.format, identity.series_uid
    # Folders mean nothing, unless there is nothing else that keeps two patients apart.
    folder = "" if identity.patient_id or identity.study_uid else os.path.dirname(path)  # noqa: PTH120
    return "", folder, identity.patient_id, identity.study_uid, identity.likeness


def _content_digest(files: Sequence[FoundFile]) -> str:
    digests: set[str] = set()
    for file in files:
        try:
            with open_binary(file.path) as stream:
                digests.add(hashlib.file_digest(stream, "sha256").hexdigest())  # pyright: ignore[reportArgumentType]
        except OSError:  # the series is refused when it is read; until then it needs some name
            digests.add("unreadable")
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
