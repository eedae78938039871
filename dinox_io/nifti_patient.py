"""Whose a NIfTI file is: the format names no patient, so its path must, by a rule or by what the user says.

Invariant: a pure function of the path, so that neither the order of files nor what lies beside them matters; in doubt
two files are of one patient, since a patient on both sides of a split is worse than too few patients.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath

from dinox_io.image import Identity

_SUBJECT = re.compile(r"sub-([A-Za-z0-9]+)")
_CASES = re.compile(r"(images|labels)(Tr|Ts|Va|Val)", re.IGNORECASE)
"""Folders of the Medical Segmentation Decathlon, nnU-Net and AMOS: a file of each case."""
_CHANNEL = re.compile(r"_000\d$")
"""What nnU-Net puts behind a case's name. CASE_0010 and on is no channel: AMOS numbers its patients so."""
_CONTENT = "content "


def series_name(content: str, patient: str) -> str:
    """What a NIfTI series is called before it gets a pseudonym: 64 hex digits of its bytes, and its patient.

    Two patients with one file are two series with equal pixels, as they would be from DICOM.
    """
    return f"{_CONTENT}{content} of {patient}"


def patient_by_path(path: str, top: str) -> tuple[str, str]:
    """(name, what it was made of) of the patient of a file found under the input `top`: see docs/decisions.md."""
    *folders, name = _below(path, top).split("/")
    for folder in folders:
        if match := _SUBJECT.fullmatch(folder):
            return match[1], "BIDS subject"
    if match := _SUBJECT.match(name):
        return match[1], "BIDS subject"
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE) or name
    if _CASES.fullmatch(PurePath(path).parent.name):
        return _CHANNEL.sub("", stem) or stem, "file name"
    return (folders[0], "folder") if folders else (stem, "file name")


def _below(path: str, top: str) -> str:
    return path[len(top.rstrip("/")) :].lstrip("/") if path != top else PurePath(path).name


class PatientPattern:
    """--nifti-patient: a regular expression whose first group, on the path below the input, names the patient."""

    def __init__(self, expression: str) -> None:
        """ValueError if it is none, or has no group."""
        try:
            self._pattern = re.compile(expression)
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if not self._pattern.groups:
            raise ValueError("it has no group (…) to name the patient")
        self.files = 0
        """NIfTI files that were asked about."""
        self.unmatched = 0
        """How many of them it names no patient for."""

    def named(self, identity: Identity, path: str, top: str) -> Identity:
        """The identity of a NIfTI file with the patient that the expression finds; as it was if it finds none."""
        match = self._pattern.search(_below(path, top))
        patient = (match[1] or "") if match else ""
        self.files += 1
        if not patient:
            self.unmatched += 1
            return identity
        content = identity.series_uid.removeprefix(_CONTENT)[:64]
        name = series_name(content, patient)
        return replace(identity, patient_id=patient, patient_from="--nifti-patient", series_uid=name)


def files_by_folder(series: Iterable[tuple[str, str, str, int]]) -> tuple[int, int]:
    """(files, patients) where several NIfTI series count as one patient because they lie in one folder.

    Args:
        series: (format, what the patient was made of, patient, files) of each series of the input.
    """
    found: dict[str, list[int]] = {}
    for kind, origin, patient, files in series:
        if kind == "nifti" and origin == "folder":
            found.setdefault(patient, []).append(files)
    several = [files for files in found.values() if len(files) > 1]
    return sum(map(sum, several)), len(several)
