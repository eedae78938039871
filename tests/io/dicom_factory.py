"""Small DICOM files for tests: a CT series of a few tiny slices, with anything changed that a test wants changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

ROWS, COLUMNS = 10, 14
Change = Callable[[int, Dataset], None]


def stored_slice(index: int, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Stored values of slice `index` (uint16, 0..4095): another picture for each index."""
    return np.random.default_rng(1000 + index).integers(0, 4096, (rows, columns), dtype=np.uint16)


def expected_hu(count: int, intercept: int = -1024) -> np.ndarray:
    """HU (z, y, x) of the series that `write_series(folder, count)` writes."""
    return np.stack([stored_slice(index).astype(np.int16) + np.int16(intercept) for index in range(count)])


def slice_dataset(index: int = 0, *, step_mm: float = 1.0, series: str = "1.2.3.4", patient: str = "P1") -> Dataset:
    """An axial CT slice at height index * step_mm, as a scanner writes it (explicit little endian)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[series, patient, str(index)])
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Modality = "CT"
    dataset.Manufacturer = "SIEMENS"
    dataset.PatientID = patient
    dataset.PatientName = "Doe^Jane"
    dataset.StudyInstanceUID = "1.2.3"
    dataset.SeriesInstanceUID = series
    dataset.InstanceNumber = index + 1
    dataset.PatientPosition = "HFS"
    dataset.KVP = "120"
    dataset.ConvolutionKernel = "B30f"
    dataset.SliceThickness = "1.0"
    dataset.ImagePositionPatient = [-10.0, -20.0, index * step_mm]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.7, 0.9]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "1", "-1024", "HU"
    set_pixels(dataset, stored_slice(index))
    return dataset


def set_pixels(dataset: Dataset, stored: np.ndarray) -> None:
    """Give a data set native pixels, little endian."""
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OW"


def write(dataset: Dataset, path: Path, **options: Any) -> Path:
    """Write a data set with preamble and meta; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True, **options)
    return path


def write_series(
    folder: Path, count: int = 5, *, change: Change | None = None, step_mm: float = 1.0, series: str = "1.2.3.4",
    patient: str = "P1",
) -> list[Path]:  # fmt: skip
    """Write `count` slices as 000.dcm …; `change(index, dataset)` may alter each before it is written."""
    paths = []
    for index in range(count):
        dataset = slice_dataset(index, step_mm=step_mm, series=series, patient=patient)
        if change is not None:
            change(index, dataset)
        paths.append(write(dataset, folder / f"{index:03d}.dcm"))
    return paths
