"""One DICOM file: what its header says of its images, and their stored pixel values. The only importer of pydicom.

Invariant: a file is untrusted. Its header is read without its pixels, a deflated one is inflated only so far as its
header allows, and sizes are checked before anything is allocated. Texts that could identify a patient are held only in
`Identity`, for pseudonyms and OUT/private.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom import config as pydicom_config
from pydicom.pixels import get_decoder
from pydicom.uid import UID, UID_dictionary

from dinox_io import attributes
from dinox_io.attributes import Numbers
from dinox_io.fileformat import BIG_ENDIAN, DEFLATED, DICOMDIR_CLASS, EXPLICIT, IMPLICIT, NotDicom, file_meta, inflate
from dinox_io.rules import Refused

RLE = "1.2.840.10008.1.2.5"
LOSSY = frozenset(
    {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 52, 53, 54, 55, 56, 81, 91, 93, 203)}
)  # .91, .93 and .203 may be lossless too: then LossyImageCompression says so
LOSSY_OR_NOT = frozenset({f"1.2.840.10008.1.2.4.{n}" for n in (91, 93, 203)})

EDGE_MAX = 4096
FRAMES_MAX = 65535
INFLATED_HEADER_BYTES_MAX = 8 << 20
SURPLUS_BYTES_MAX = 1024
"""Bytes beyond the pixels that are taken for padding (and never more than a quarter of a frame)."""

_IDENTITY = ["PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID"]
_IMAGE = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "BurnedInAnnotation", "LossyImageCompression", "Manufacturer", "PatientPosition", "ConvolutionKernel", "KVP",
    "GantryDetectorTilt", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "SliceThickness", "SpacingBetweenSlices",
]  # fmt: skip
_GROUPS = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
_DIRECTORY = ["DirectoryRecordSequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who and what a file belongs to. Never leaves the packer but into OUT/private."""

    patient_id: str
    issuer: str
    study_uid: str
    series_uid: str
    likeness: str
    """Orientation, matrix and kernel: groups files that name no series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """Facts that all frames of one file share, and where its pixels lie."""

    path: str
    syntax: str
    sop_class: str
    sop_uid: str
    modality: str
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: int | None
    burned_in: str
    lossy: str
    manufacturer: str
    patient_position: str
    pixel_offset: int | None
    """Where the pixel data element begins (in the inflated file, if it is deflated); None: there is none."""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one native frame."""
        return self.rows * self.columns * self.bits_allocated // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One frame: the facts by which slices of a series may differ. None: absent or unusable. mm, degrees, kV."""

    file: ImageFile
    frame: int
    image_type: tuple[str, ...]
    position: tuple[float, float, float] | None
    orientation: Numbers | None
    pixel_spacing: tuple[float, float] | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    thickness: float | None
    spacing_between: float | None
    tilt: float | None
    kernel: str
    kvp: float | None


# ---------------------------------------------------------------------------------------------- reading headers


@contextmanager
def _quietly() -> Iterator[None]:
    """pydicom prints values of damaged elements: neither its warnings nor its log may get out."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings(), pydicom_config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def read_identity(path: Path) -> Identity:
    """To which patient, study and series a file belongs; reads its header only.

    Raises:
        NotDicom: it is no DICOM image (see `NotDicom.code`).
        OSError: it cannot be read.
    """
    wanted = [*_IDENTITY, *_DIRECTORY, "SOPClassUID", "Modality", "Rows", "Columns", "ImageOrientationPatient"]
    with path.open("rb") as file, _quietly():
        dataset, _, _ = _header(file, [*wanted, "ConvolutionKernel"])
        try:
            orientation = attributes.numbers(dataset, "ImageOrientationPatient", 6) or ()
            likeness = [f"{value:.3f}" for value in orientation]
            likeness += [attributes.text(dataset, name) for name in ("Rows", "Columns", "ConvolutionKernel")]
            patient_id, issuer, study, series = (attributes.text(dataset, name) for name in _IDENTITY)
        except Exception as error:
            raise NotDicom("DICOM_DAMAGED") from error
    return Identity(
        patient_id=patient_id, issuer=issuer, study_uid=study, series_uid=series, likeness="/".join(likeness)
    )


def read_slices(path: Path) -> list[Slice]:
    """What a file's header says of each of its frames.

    Raises:
        NotDicom: it is no DICOM image, or damaged.
        Refused: SIZE_REFUSED, for a number of frames or a matrix that no CT has.
        OSError: it cannot be read.
    """
    with path.open("rb") as file, _quietly():
        dataset, syntax, offset = _header(file, [*_IMAGE, *_GROUPS])
        try:
            image = _image_file(str(path), dataset, syntax, offset)
            return _frames(image, dataset)
        except (Refused, NotDicom):
            raise
        except Exception as error:
            raise NotDicom("DICOM_DAMAGED") from error


def _header(file: BinaryIO, tags: list[str]) -> tuple[pydicom.Dataset, str, int | None]:
    """(dataset of `tags`, transfer syntax, offset of the pixel data element or None)."""
    head = file.read(132)
    start, syntax, media_class = file_meta(file, head)
    if media_class == DICOMDIR_CLASS:
        raise NotDicom("DICOMDIR")
    stream: BinaryIO = file
    if syntax == DEFLATED:
        stream = io.BytesIO(inflate(file, start, INFLATED_HEADER_BYTES_MAX))
    stream.seek(0)
    try:
        # Any exception of a parser that is fed rubbish means the same: the header is damaged.
        dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(tags), force=True)
        encoding = dataset.original_encoding
        position = stream.tell()
    except Exception as error:
        raise NotDicom("DICOM_DAMAGED" if start else "NOT_DICOM") from error
    _check_plausible(dataset, stream, start, syntax)
    if syntax is None:
        implicit, little = encoding
        syntax = IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
    order = ">" if syntax == BIG_ENDIAN else "<"
    stream.seek(position)
    tag = np.frombuffer(stream.read(4).ljust(4, b"\0"), f"{order}u2")
    if tuple(tag) == (0x7FE0, 0x0010):
        return dataset, syntax, position
    if syntax == DEFLATED and stream.seek(0, os.SEEK_END) >= INFLATED_HEADER_BYTES_MAX:
        raise NotDicom("DICOM_DAMAGED")  # what inflates without end is no header
    return dataset, syntax, None


def _check_plausible(dataset: pydicom.Dataset, stream: BinaryIO, start: int, syntax: str | None) -> None:
    if "DirectoryRecordSequence" in dataset:
        raise NotDicom("DICOMDIR")
    if len(dataset) == 0:
        stream.seek(0, os.SEEK_END)
        empty = syntax != DEFLATED and stream.tell() <= start
        raise NotDicom("NOT_DICOM" if empty or not start else "DICOM_DAMAGED")
    if not start and not ("SOPClassUID" in dataset or "Modality" in dataset):
        raise NotDicom("NOT_DICOM")


def _image_file(path: str, dataset: pydicom.Dataset, syntax: str, offset: int | None) -> ImageFile:
    allocated = attributes.integer(dataset, "BitsAllocated", 0)
    stored = attributes.integer(dataset, "BitsStored", allocated)
    signed = attributes.integer(dataset, "PixelRepresentation", 0) == 1
    image = ImageFile(
        path=path,
        syntax=syntax,
        sop_class=attributes.text(dataset, "SOPClassUID"),
        sop_uid=attributes.text(dataset, "SOPInstanceUID"),
        modality=attributes.text(dataset, "Modality"),
        rows=attributes.integer(dataset, "Rows", 0),
        columns=attributes.integer(dataset, "Columns", 0),
        frames=attributes.integer(dataset, "NumberOfFrames", 1),
        samples=attributes.integer(dataset, "SamplesPerPixel", 1),
        photometric=attributes.text(dataset, "PhotometricInterpretation"),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=attributes.integer(dataset, "HighBit", stored - 1),
        signed=signed,
        padding=_padding(dataset, stored, signed),
        burned_in=attributes.text(dataset, "BurnedInAnnotation").upper(),
        lossy=attributes.text(dataset, "LossyImageCompression"),
        manufacturer=attributes.text(dataset, "Manufacturer"),
        patient_position=attributes.text(dataset, "PatientPosition"),
        pixel_offset=offset,
    )
    sizes_possible = 0 < image.rows <= EDGE_MAX and 0 < image.columns <= EDGE_MAX and 0 < image.frames <= FRAMES_MAX
    if offset is not None and not sizes_possible:
        raise Refused("SIZE_REFUSED", rows=image.rows, columns=image.columns, frames=image.frames)
    return image


def _padding(dataset: pydicom.Dataset, bits: int, signed: bool) -> int | None:
    """PixelPaddingValue as a stored value: writers confuse US and SS, so its bits are read as the pixels' are."""
    value = attributes.number(dataset, "PixelPaddingValue")
    if value is None or not value.is_integer() or not -(2**31) <= value < 2**32 or not 0 < bits <= 32:
        return None
    if value >= 2 ** (bits - 1) and signed:
        value -= 2**bits if value < 2**bits else 2**16
    return int(value)


def _frames(image: ImageFile, dataset: pydicom.Dataset) -> list[Slice]:
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if image.frames > 1 and len(per_frame) not in (0, image.frames):
        raise NotDicom("DICOM_DAMAGED")
    if image.frames == 1 and not per_frame:
        return [_slice(image, 0, [dataset])]
    # Without functional groups all frames have the file's own attributes: one position, refused later as such.
    groups = per_frame or [pydicom.Dataset()] * image.frames
    return [_slice(image, number, [*_macros(own), *_macros(shared), dataset]) for number, own in enumerate(groups)]


_MACROS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence", "CTReconstructionSequence", "CTXRayDetailsSequence", "CTAcquisitionDetailsSequence",
    "UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence",
)  # fmt: skip


def _macros(group: pydicom.Dataset) -> list[pydicom.Dataset]:
    """The items of the functional group macros (DICOM PS3.3 C.7.6.16) in which a slice's facts may lie."""
    return [item for name in _MACROS if len(item := _first(group, name))]


def _first(dataset: pydicom.Dataset, keyword: str) -> pydicom.Dataset:
    items = dataset.get(keyword)
    return items[0] if items else pydicom.Dataset()


def _slice(image: ImageFile, frame: int, places: list[pydicom.Dataset]) -> Slice:
    def numbers(keyword: str, count: int) -> Any:
        return next((found for place in places if (found := attributes.numbers(place, keyword, count))), None)

    def number(keyword: str) -> float | None:
        found = numbers(keyword, 1)
        return found[0] if found else None

    def text(*keywords: str) -> str:
        return next((found for place in places for name in keywords if (found := attributes.text(place, name))), "")

    return Slice(
        file=image,
        frame=frame,
        image_type=tuple(part.strip().upper() for part in text("FrameType", "ImageType").split("\\")),
        position=numbers("ImagePositionPatient", 3),
        orientation=numbers("ImageOrientationPatient", 6),
        pixel_spacing=numbers("PixelSpacing", 2),
        slope=number("RescaleSlope"),
        intercept=number("RescaleIntercept"),
        rescale_type=text("RescaleType").upper(),
        thickness=number("SliceThickness"),
        spacing_between=number("SpacingBetweenSlices"),
        tilt=number("GantryDetectorTilt"),
        kernel=text("ConvolutionKernel"),
        kvp=number("KVP"),
    )


# ---------------------------------------------------------------------------------------------- pixels


def inflated(image: ImageFile, pixel_bytes: int) -> bytes:
    """A deflated file's data set up to the end of `pixel_bytes` of pixels and a little padding, and no further."""
    with Path(image.path).open("rb") as file, _quietly():
        start, _, _ = file_meta(file, file.read(132))
        return inflate(file, start, (image.pixel_offset or 0) + 12 + pixel_bytes + SURPLUS_BYTES_MAX + 1)


def syntax_name(uid: str) -> str:
    """The registered name of a transfer syntax; an unregistered one is not repeated (it could be anything)."""
    return UID_dictionary[uid][0] if uid in UID_dictionary else "an unregistered transfer syntax"


_GDCM_ONLY = frozenset({f"1.2.840.10008.1.2.4.{n}" for n in (51, 53, 55)})
"""Lossy JPEG of 12 bits: python-gdcm decodes it, pydicom's plugins do not."""


def _gdcm_frame(image: ImageFile) -> np.ndarray:
    """Stored values (rows, columns) of a single-frame file, by GDCM itself."""
    name = syntax_name(image.syntax)
    try:
        import gdcm
    except ImportError:
        raise Refused("DECODER_MISSING", syntax=name) from None
    reader = gdcm.ImageReader()
    reader.SetFileName(image.path)
    if not reader.Read():
        raise Refused("PIXELS_DAMAGED", syntax=name)
    picture = reader.GetImage()
    # SWIG hands bytes out as text.
    raw = picture.GetBuffer().encode("utf-8", "surrogateescape")
    if len(raw) != image.frame_bytes or image.bits_allocated not in (8, 16):
        raise Refused("PIXELS_DAMAGED", syntax=name)
    kind = "i" if image.signed else "u"
    return np.frombuffer(raw, f"={kind}{image.bits_allocated // 8}").reshape(image.rows, image.columns)


class CompressedFile:
    """Frames of a file in a compressed syntax, decoded one at a time by pydicom's plugins.

    Raises:
        Refused: DECODER_MISSING or SYNTAX_UNSUPPORTED.
        OSError: it cannot be read.
    """

    _ORDER = ("pydicom", "gdcm", "pyjpegls", "pylibjpeg", "pillow")
    """Tried in this order, so that the same plugins give the same pixels whatever else is installed."""

    def __init__(self, image: ImageFile) -> None:
        name = syntax_name(image.syntax)
        self._image = image
        self._decoder = None
        self._dataset: pydicom.Dataset | None = None
        if image.syntax in _GDCM_ONLY and image.photometric == "MONOCHROME2" and image.frames == 1:
            return
        if image.syntax not in UID_dictionary:
            raise Refused("SYNTAX_UNSUPPORTED", syntax=name)
        try:
            self._decoder = get_decoder(UID(image.syntax))
        except NotImplementedError:
            raise Refused("SYNTAX_UNSUPPORTED", syntax=name) from None
        self._plugins = [plugin for plugin in self._ORDER if plugin in self._decoder.available_plugins]
        if not self._plugins:
            raise Refused("DECODER_MISSING", syntax=name)

    def frame(self, number: int) -> np.ndarray:
        """Stored values of a frame, integers (rows, columns); Refused PIXELS_DAMAGED if it does not decode."""
        image = self._image
        if self._decoder is None:
            return _gdcm_frame(image)
        for plugin in self._plugins:
            try:
                with _quietly():
                    if self._dataset is None:
                        self._dataset = pydicom.dcmread(image.path, specific_tags=["PixelData", *_IMAGE])
                    values, _ = self._decoder.as_array(
                        self._dataset, index=number, raw=True, validate=True, decoding_plugin=plugin
                    )
            except MemoryError:
                raise
            except Exception:  # whatever a codec throws at damaged bytes, the next one may know better
                continue
            if values.shape == (image.rows, image.columns) and values.dtype.kind in "iu":
                return values
        raise Refused("PIXELS_DAMAGED", syntax=syntax_name(image.syntax))
