"""Kinds of faults in how a series is stored: single slices, several in a file, transfer syntaxes.

Invariant: a kind writes files into an empty folder and says what packing them must give; it uses nothing of dinox_io.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.io.dicom_factory import write
from tests.io.fault_kind import Expected, Make, accepted, kind, one_item, refused, setting
from tests.io.jpeg_file import compress, compressible, fragments, jpeg_header
from tests.io.random_scan import FORMATS, Scan, encode, first_slices, with_format

# ---------------------------------------------------------------------------------------------- one slice or one file


@kind(
    "ts_original", "ts_LittleEndianImplicit", "ts_LittleEndianExplicit", "ts_BigEndianExplicit", "ts_DeflatedExplicit",
    "ts_RLELossless", "pyd_CT_small", min_slices=1,
)  # fmt: skip
def a_single_slice(scan: Scan, folder: Path) -> Expected:
    scan = first_slices(scan, 1)
    scan.write(folder, setting(SpacingBetweenSlices="6.5", SliceThickness="5"))
    return accepted(scan, spacing_mm=[6.5, *scan.spacing_mm])


@kind("pyd_J2K_pixelrep_mismatch", min_slices=1)
def a_single_slice_of_a_tilted_gantry(scan: Scan, folder: Path) -> Expected:
    scan = first_slices(scan, 1)
    scan.write(folder, setting(GantryDetectorTilt="-22"))
    return refused(scan, "GANTRY_TILT")


@kind("dcmqi_23x38x3_single")
def one_column(scan: Scan, folder: Path) -> Expected:
    scan = replace(scan, stored=scan.stored[:, :, :1])
    scan.write(folder)
    return accepted(scan, shape=[scan.count, scan.stored.shape[1], 1])


@kind("dcmqi_23x38x3_single")
def one_row(scan: Scan, folder: Path) -> Expected:
    scan = replace(scan, stored=scan.stored[:, :1])
    scan.write(folder)
    return accepted(scan, shape=[scan.count, 1, scan.stored.shape[2]])


def multiframe(scan: Scan, order: np.ndarray, **frame_content: Any) -> Dataset:
    """A Legacy Converted Enhanced CT (PS3.3 A.70) whose frame i is slice order[i]."""
    dataset = scan.dataset(0)
    encode(dataset, scan.stored[order], scan.format, scan.syntax)
    dataset.SOPClassUID, dataset.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.2.2", scan.count
    shared = Dataset()
    shared.PixelMeasuresSequence = one_item(PixelSpacing=list(dataset.PixelSpacing), SliceThickness="1")
    shared.PlaneOrientationSequence = one_item(ImageOrientationPatient=list(dataset.ImageOrientationPatient))
    rescale = one_item(RescaleSlope=scan.slope, RescaleIntercept=scan.intercept, RescaleType="HU")
    shared.PixelValueTransformationSequence = rescale
    frames = []
    for index in order:
        frame = Dataset()
        frame.PlanePositionSequence = one_item(ImagePositionPatient=scan.position(index * scan.step_mm))
        frame.FrameContentSequence = one_item(FrameAcquisitionNumber=1, **frame_content)
        frames.append(frame)
    setting(
        ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None, RescaleSlope=None,
        RescaleIntercept=None, SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(frames),
    )(0, dataset)  # fmt: skip
    return dataset


@kind("derived/44", "dcmqi_23x38x3_multiframe")
def frames_in_any_order(scan: Scan, folder: Path) -> Expected:
    write(multiframe(scan, scan.random.permutation(scan.count)), folder / "one")
    return accepted(scan, multiframe=True)


@kind("pyd_eCT_Supplemental")
def a_perfusion_map(scan: Scan, folder: Path) -> Expected:
    dataset = multiframe(scan, np.arange(scan.count))
    frame_type = one_item(
        FrameType=["DERIVED", "PRIMARY", "PERFUSION", str(scan.random.choice(["RCBF", "MTT", "RCBV"]))]
    )
    dataset.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence = frame_type
    write(dataset, folder / "one")
    return refused(scan, "PARAMETRIC_MAP", 1)


# ---------------------------------------------------------------------------------------------- encodings


@kind("derived/09")
def no_preamble(scan: Scan, folder: Path) -> Expected:
    syntax = ExplicitVRLittleEndian if scan.syntax == ExplicitVRLittleEndian else ImplicitVRLittleEndian
    scan = replace(scan, syntax=syntax)
    for index in range(scan.count):
        dataset = scan.dataset(index)
        del dataset.file_meta
        folder.mkdir(parents=True, exist_ok=True)
        implicit = syntax == ImplicitVRLittleEndian
        dataset.save_as(
            folder / f"{index * 7 % 11}", implicit_vr=implicit, little_endian=True, enforce_file_format=False
        )
    return accepted(scan)


@kind("derived/43")
def every_encoding_in_one_series(scan: Scan, folder: Path) -> Expected:
    encodings = [RLELossless, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian]

    def change(index: int, dataset: Dataset) -> None:
        encode(dataset, scan.stored[index], scan.format, ([scan.syntax, *encodings])[index % 5])

    scan.write(folder, change)
    return accepted(scan)


LOSSLESS = {
    "1.2.840.10008.1.2.4.57": ("derived/40", "ts_JPEGProcess14TransferSyntax"),
    "1.2.840.10008.1.2.4.70": ("derived/40", "ts_JPEGProcess14SV1TransferSyntax"),
    "1.2.840.10008.1.2.4.80": ("derived/41", "ts_JPEGLSLossless"),
    "1.2.840.10008.1.2.4.90": ("derived/42", "ts_JPEG2000LosslessOnly", "totalsegmentator_j2k"),
}
LOSSY = {
    "1.2.840.10008.1.2.4.50": ("ts_JPEGProcess1TransferSyntax",),
    "1.2.840.10008.1.2.4.51": ("ts_JPEGProcess2_4",),
    "1.2.840.10008.1.2.4.53": ("ts_JPEGProcess6_8",),
    "1.2.840.10008.1.2.4.55": ("ts_JPEGProcess10_12",),
    "1.2.840.10008.1.2.4.81": ("ts_JPEGLSLossyTransferSyntax",),
    "1.2.840.10008.1.2.4.91": ("ts_JPEG2000TransferSyntax",),
}
LOSSY_TOLERANCE_HU = 40
OF_PILLOW = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
"""Pillow comes with matplotlib: these have a decoder without the extra."""


def jpeg(syntax: str) -> Make:
    """A scan in one of the JPEG family, which needs the [dicom] extra: without it, the refusal that names it."""

    def make(scan: Scan, folder: Path) -> Expected:
        form = FORMATS["u8" if syntax.endswith(".50") else "u12" if syntax in LOSSY else "s16"]
        # OpenJPEG compresses no picture of less than 32 rows or columns, GDCM none of an odd number of bytes.
        scan = with_format(replace(scan, stored=np.zeros((scan.count, 38, 41), np.int64)), form)
        if syntax in LOSSY:  # of noise a lossy codec leaves nothing
            scan.stored[:] = np.add.outer(np.arange(scan.count), np.add.outer(*map(np.arange, scan.stored.shape[1:])))
        if not compressible():
            scan.write(folder, lambda _, dataset: fragments(dataset, syntax, [jpeg_header(38, 41)]))
            return refused(scan, "PIXELS_DAMAGED" if syntax in OF_PILLOW else "DECODER_MISSING")
        for path in scan.write(folder, setting(LossyImageCompression="01" if syntax in LOSSY else None)):
            compress(path, syntax)
        return replace(accepted(scan, lossy=syntax in LOSSY), tolerance_hu=LOSSY_TOLERANCE_HU if syntax in LOSSY else 0)

    make.__name__ = f"jpeg_{syntax.rpartition('.')[2]}"
    return make


for uid, names in {**LOSSLESS, **LOSSY}.items():
    kind(*names, syntax=ExplicitVRLittleEndian)(jpeg(uid))
