"""Phantom slices as the DICOM files that a scanner exports: real headers, fictitious people.

Only importer of pydicom in the phantom. Invariant: no clock, no host name, no library version gets into a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    XRayRadiationDoseSRStorage,
)

from phantom.study import PADDING_STORED, SeriesPlan, StudyPlan

IMPLEMENTATION_UID = UID("2.25.190733652812470912847120974109247019283")


def write(path: Path, dataset: Dataset, *, implicit: bool = False) -> None:
    """Write one Part 10 file."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    meta.ImplementationVersionName = "DINOX_PHANTOM"
    dataset.file_meta = meta
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, dataset, enforce_file_format=True)


def study_dataset(study: StudyPlan, sop_class: str, name: str) -> Dataset:
    """What every object of a study says; `name` makes its SOPInstanceUID."""
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 100"
    data.SOPClassUID = sop_class
    data.SOPInstanceUID = study.uid(f"object {name}")
    data.StudyDate = f"2001{1 + study.number % 12:02d}{1 + study.number % 28:02d}"
    data.SeriesDate = data.AcquisitionDate = data.ContentDate = data.StudyDate
    data.StudyTime = f"{8 + study.number % 10:02d}1500"
    data.AccessionNumber = f"FICTION{study.number + 1:04d}"
    data.Modality = "CT"
    data.Manufacturer = "FICTITIOUS IMAGING"
    data.ManufacturerModelName = "PHANTOM ONE"
    data.InstitutionName = "HOSPITAL THAT DOES NOT EXIST"
    data.StationName = "PHANTOM01"
    data.ReferringPhysicianName = "NOBODY^AT^ALL"
    data.StudyDescription = "CT CHEST PHANTOM"
    data.PatientName = study.patient_name
    data.PatientID = study.patient_id
    data.PatientBirthDate = f"19{40 + study.number % 40}0101"
    data.PatientSex = "FMO"[study.number % 3]
    data.PatientAge = f"{2001 - 1940 - study.number % 40:03d}Y"
    data.StudyInstanceUID = study.uid("study")
    data.StudyID = f"{study.number + 1}"
    data.FrameOfReferenceUID = study.uid("frame of reference")
    return data


def _pixels(data: Dataset, stored: np.ndarray[Any, Any], *, bits: int, signed: bool) -> None:
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated = 16 if bits > 8 else 8
    data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelRepresentation = int(signed)
    kind = np.dtype(("<i2" if signed else "<u2") if bits > 8 else "u1")
    data.add_new(0x7FE00010, "OW" if bits > 8 else "OB", np.ascontiguousarray(stored, kind).tobytes())


def stored_values(series: SeriesPlan, hu: np.ndarray[Any, np.dtype[np.int16]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The numbers in the file for a slice of HU (rows, columns): cut to the scanner's range, padded where it pads."""
    storage = series.study.storage
    stored = hu.astype(np.int32) - storage.intercept
    if not storage.signed:
        stored = np.clip(stored, 0, 2**storage.bits - 1)
    if storage.padded:
        stored[series.study.grid.outside_circle()] = PADDING_STORED
    return stored


def slice_dataset(series: SeriesPlan, index: int, stored: np.ndarray[Any, Any]) -> Dataset:
    """A CT Image Storage object (DICOM PS3.3 A.3) for one slice."""
    study, protocol, storage = series.study, series.protocol, series.study.storage
    data = study_dataset(study, CTImageStorage, f"{series.number}/{index}")
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SeriesDescription = protocol.description
    data.ProtocolName = "CHEST ROUTINE"
    data.SeriesInstanceUID = series.uid
    data.SeriesNumber = series.number + 2
    data.AcquisitionNumber = 1
    data.InstanceNumber = series.count - index if study.export.descending else index + 1
    data.BodyPartExamined = "CHEST"
    data.ScanOptions = "HELICAL MODE"
    data.KVP = 120
    data.XRayTubeCurrent = 180 + 10 * (study.number % 7)
    data.ExposureTime = 500
    data.ConvolutionKernel = protocol.kernel
    data.SliceThickness = protocol.thickness_mm
    data.SpacingBetweenSlices = protocol.spacing_mm
    data.GantryDetectorTilt = 0
    data.PatientPosition = study.export.position
    position = series.position_mm(index)
    data.ImagePositionPatient = [f"{value:.3f}" for value in position]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    # Some scanners count the table's way: SliceLocation is no substitute for the position.
    data.SliceLocation = f"{-position[2] if study.export.position == 'FFS' else position[2]:.3f}"
    data.PixelSpacing = [study.grid.pixel_mm, study.grid.pixel_mm]
    data.ReconstructionDiameter = f"{study.grid.pixel_mm * study.grid.columns:.1f}"
    data.BurnedInAnnotation = "NO"
    data.RescaleIntercept = storage.intercept
    data.RescaleSlope = 1
    data.RescaleType = "HU"
    data.WindowCenter, data.WindowWidth = (-600, 1500) if protocol.kernel == "LUNG" else (40, 400)
    if storage.padded:
        data.add_new(0x00280120, "SS", PADDING_STORED)
    _pixels(data, stored, bits=storage.bits, signed=storage.signed)
    return data


def write_series(series: SeriesPlan, folder: Path, tick: Callable[[], None]) -> np.ndarray[Any, Any]:
    """Write all slices; returns their projection from the front, mean HU float32 (slices, columns), ascending z."""
    export = series.study.export
    # A database hands files out in its own order: the names say nothing about z.
    names = series.study.random(10 + series.number).permutation(series.count) + 1
    projection = np.empty((series.count, series.study.grid.columns), np.float32)
    for index in range(series.count):
        hu = series.slice_hu(index)
        projection[index] = hu.mean(axis=0)
        data = slice_dataset(series, index, stored_values(series, hu))
        write(folder / export.file_name.format(names[index]), data, implicit=export.implicit)
        tick()
    return projection


def localizer_dataset(study: StudyPlan, series_uid: str, number: int, projection: np.ndarray[Any, Any]) -> Dataset:
    """A scout view from the front (coronal), made of a series' projection (slices, columns)."""
    data = study_dataset(study, CTImageStorage, f"localizer {series_uid}")
    data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    data.SeriesDescription = "SCOUT"
    data.SeriesInstanceUID = series_uid
    data.SeriesNumber = number
    data.InstanceNumber = 1
    data.SliceThickness = 600
    data.KVP = 120
    data.PatientPosition = study.export.position
    data.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    x, y, z = study.origin_mm
    height = projection.shape[0]
    rows = np.linspace(height - 1, 0, study.size // 2)
    picture = projection[np.rint(rows).astype(np.int64)]
    scan_mm = study.slices * 5.0
    data.ImagePositionPatient = [f"{float(study.grid.x[0]) + x:.3f}", f"{y:.3f}", f"{z + scan_mm:.3f}"]
    data.PixelSpacing = [f"{scan_mm / len(rows):.6f}", study.grid.pixel_mm]
    data.BurnedInAnnotation = "NO"
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = -1024, 1, "HU"
    _pixels(data, np.clip(np.rint(picture) + 1024, 0, 4095), bits=12, signed=False)
    return data


def dose_page_dataset(study: StudyPlan) -> Dataset:
    """A dose page: a secondary capture with writing in its pixels."""
    data = study_dataset(study, SecondaryCaptureImageStorage, "dose page")
    data.ImageType = ["DERIVED", "SECONDARY"]
    data.ConversionType = "WSD"
    data.SeriesDescription = "DOSE REPORT"
    data.SeriesInstanceUID = study.uid("dose page series")
    data.SeriesNumber, data.InstanceNumber = 999, 1
    data.BurnedInAnnotation = "YES"
    page = np.zeros((256, 256), np.uint8)
    letters = study.random(5).integers(0, 2, (10, 5, 60)).repeat(2, axis=1).repeat(3, axis=2) * 255
    for line in range(10):
        page[20 + 22 * line : 30 + 22 * line, 30:210] = letters[line]
    _pixels(data, page, bits=8, signed=False)
    return data


def dose_record_dataset(study: StudyPlan) -> Dataset:
    """The same as a structured report, which has no pixels."""
    data = study_dataset(study, XRayRadiationDoseSRStorage, "dose record")
    data.Modality = "SR"
    data.SeriesDescription = "DOSE RECORD"
    data.SeriesInstanceUID = study.uid("dose record series")
    data.SeriesNumber, data.InstanceNumber = 998, 1
    data.CompletionFlag, data.VerificationFlag = "COMPLETE", "UNVERIFIED"
    data.ValueType, data.ContinuityOfContent = "CONTAINER", "SEPARATE"
    return data


def magnetic_resonance_dataset(study: StudyPlan, index: int) -> Dataset:
    """One slice of a small MR series of the same patient: it has no HU."""
    data = study_dataset(study, MRImageStorage, f"magnetic resonance {index}")
    data.Modality = "MR"
    data.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "SE", "NONE", ""
    data.RepetitionTime, data.EchoTime = 500, 15
    data.SeriesDescription = "T1 SE AXIAL"
    data.SeriesInstanceUID = study.uid("magnetic resonance series")
    data.SeriesNumber, data.InstanceNumber = 50, index + 1
    data.SliceThickness = data.SpacingBetweenSlices = 6
    data.PixelSpacing = [3, 3]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = ["-190.500", "-190.500", f"{6.0 * index:.3f}"]
    side = np.linspace(-1.0, 1.0, 128)
    signal = 700.0 * (side[None, :] ** 2 + (1.3 * side[:, None]) ** 2 < 0.8 - 0.05 * index)
    _pixels(data, np.rint(signal + study.random(6).uniform(0, 60, (128, 128))), bits=12, signed=False)
    return data
