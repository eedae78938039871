"""What lies beside the wanted series in a scanner's export: scouts, dose pages, another modality, and plain rubbish.

It is written so that a packer has something to reject; which patients get what goes by their number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import MediaStorageDirectoryStorage

from phantom.dicom_export import (
    dose_page_dataset,
    dose_record_dataset,
    localizer_dataset,
    magnetic_resonance_dataset,
    write,
)
from phantom.study import SeriesPlan, StudyPlan

MAGNETIC_RESONANCE_SLICES = 4
RUBBISH = {
    ".DS_Store": b"\x00\x00\x00\x01Bud1" + bytes(64),
    "Thumbs.db": bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504),
    "AUTORUN.INF": b"[autorun]\r\nopen=VIEWER\\VIEWER.EXE\r\n",
    "README.TXT": b"This disc holds a phantom. Nobody in it exists.\r\n",
    "VIEWER/VIEWER.EXE": b"MZ\x90\x00" + bytes(124) + b"not a program\n",
    "VIEWER/EMPTY.DCM": b"",
}


def write_around_study(study: StudyPlan, folder: Path, first: SeriesPlan, projection: np.ndarray[Any, Any]) -> int:
    """Write what this study has beside its CT series; `projection` is of the first. Returns the number of files."""
    files = 0
    if study.number % 3 == 0:
        write(folder / "SE000001" / "IM_0001", localizer_dataset(study, study.uid("scout series"), 1, projection))
        write(folder / "SE000999" / "IM_0001", dose_page_dataset(study))
        files += 2
    if study.number % 6 == 1:  # a scout inside the series, as some scanners file it
        name = study.export.file_name.format(first.count + 1)
        scout = localizer_dataset(study, first.uid, first.number + 2, projection)
        scout.InstanceNumber = 0
        write(folder / series_folder(first) / name, scout, implicit=study.export.implicit)
        files += 1
    if study.number % 6 == 2:
        write(folder / "SE000998" / "IM_0001", dose_record_dataset(study))
        for index in range(MAGNETIC_RESONANCE_SLICES):
            write(folder / "SE000050" / f"IM_{index + 1:04d}", magnetic_resonance_dataset(study, index))
        files += 1 + MAGNETIC_RESONANCE_SLICES
    return files


def series_folder(series: SeriesPlan) -> str:
    """Name of the folder of a CT series inside its study's."""
    return f"SE{series.number + 2:06d}"


def write_rubbish(folder: Path, study: StudyPlan) -> int:
    """Write what is no image at all, a DICOMDIR among it; returns the number of files."""
    for name, data in RUBBISH.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    directory = Dataset()
    directory.SOPClassUID = MediaStorageDirectoryStorage
    directory.SOPInstanceUID = study.uid("directory")
    directory.FileSetID = "PHANTOM"
    directory.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = 0
    directory.OffsetOfTheLastDirectoryRecordOfTheRootDirectoryEntity = 0
    directory.FileSetConsistencyFlag = 0
    directory.DirectoryRecordSequence = Sequence([])
    write(folder / "DICOMDIR", directory)
    return len(RUBBISH) + 1
