"""Thousands of small CT series in seconds: four DICOM files are made once, and copied with other numbers in them.

Invariant: every series is its own (UIDs, pixels); two belong to a patient; nobody in them exists.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

SLICES, SIDE = 4, 32
_SERIES, _PATIENT = b"10000000", b"20000000"
"""Stand for the numbers of series and patient; of fixed length, so that no offset in a file changes."""
_ROOT = "1.2.826.0.1.3680043.10.543"


def write(folder: Path, count: int) -> int:
    """Write `count` series of 4 slices of 32 x 32, each in a folder of its own; returns the number of files."""
    templates = [_template(z) for z in range(SLICES)]
    for number in range(count):
        own = folder / f"series-{number:06d}"
        own.mkdir(parents=True)
        series, patient = b"%08d" % (int(_SERIES) + 1 + number), b"%08d" % (int(_PATIENT) + 1 + number // 2)
        for z, template in enumerate(templates):
            (own / f"{z}.dcm").write_bytes(template.replace(_SERIES, series).replace(_PATIENT, patient))
    return count * SLICES


def _template(z: int) -> bytes:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = CTImageStorage
    data.SOPInstanceUID = UID(f"{_ROOT}.{_SERIES.decode()}.{z + 1}")
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.Modality, data.Manufacturer = "CT", "SIEMENS"
    data.PatientID = f"TINY{_PATIENT.decode()}"
    data.StudyInstanceUID = UID(f"{_ROOT}.1.{_PATIENT.decode()}")
    data.SeriesInstanceUID = UID(f"{_ROOT}.2.{_SERIES.decode()}")
    data.InstanceNumber, data.PatientPosition = z + 1, "HFS"
    data.KVP, data.ConvolutionKernel, data.SliceThickness = "120", "B30f", "2.5"
    data.ImagePositionPatient = [-10.0, -10.0, 2.5 * z]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.PixelSpacing = [0.7, 0.7]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows = data.Columns = SIDE
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = "1", "-1024", "HU"
    pixels = np.random.default_rng(z).normal(1000, 20, (SIDE, SIDE)).astype("<u2").tobytes()
    # The series' number stands in its first pixels: no two volumes are equal, as no two patients' are.
    data.PixelData = _SERIES + pixels[len(_SERIES) :]
    data["PixelData"].VR = "OW"
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()
