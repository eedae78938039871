"""One DICOM file: what its header says of its images, and their stored pixel values. The only importer of pydicom.

Invariant: a file is untrusted. Its header is read without its pixels, a deflated one is inflated only so far as its
header allows, and sizes are checked before anything is allocated. Texts that could identify a patient are held only in
`Identity`, for pseudonyms and OUT/private.
"""

import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom import config as pydicom_config
from pydicom.datadict import dictionary_VR
from pydicom.pixels import get_decoder
from pydicom.tag import Tag
from pydicom.uid import UID, UID_dictionary

from dinox_io import attributes, elements
from dinox_io.archive import ArchiveError, open_binary
from dinox_io.elements import HEAD_BYTES, Unusual
from dinox_io.fileformat import BIG_ENDIAN, DEFLATED, DICOMDIR_CLASS, EXPLICIT, IMPLICIT, NotDicom, file_meta, inflate
from dinox_io.frames import read_frames
from dinox_io.image import CT_IMAGES, Identity, ImageFile, Slice
from dinox_io.rules import Refused

RLE = "1.2.840.10008.1.2.5"
LOSSY = frozenset(
    {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 52, 53, 54, 55, 56, 81, 91, 93, 203)}
)  # .91, .93 and .203 may be lossless too: then LossyImageCompression says so
LOSSY_OR_NOT = frozenset({f"1.2.840.10008.1.2.4.{n}" for n in (91, 93, 203)})

CODESTREAMS = frozenset({f"1.2.840.10008.1.2.4.{n}" for n in (*range(50, 94), 201, 202, 203)})
"""Syntaxes whose fragments are codestreams with a size of their own: the JPEG family."""

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
    "RescaleIntercept", "RescaleType", "SliceThickness", "SpacingBetweenSlices", "AcquisitionNumber",
    "TemporalPositionIdentifier", "StudyInstanceUID", "AcquisitionTime", "ContentTime",
]  # fmt: skip
_IDENTITY_TAGS = {int(Tag(name)): (name, dictionary_VR(name)) for name in [*_IDENTITY, "SOPClassUID", "Modality"]}
_LAST_OF_IDENTITY = int(Tag("SeriesInstanceUID"))
_IMAGE_TAGS = {int(Tag(name)): (name, dictionary_VR(name)) for name in _IMAGE}
_GROUPS = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
_DIRECTORY = ["DirectoryRecordSequence"]


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
    with open_binary(path) as file:
        return identify(file, file.read(HEAD_BYTES))


def identify(file: BinaryIO, head: bytes) -> Identity:
    """`read_identity` of an open file, whose first bytes (elements.HEAD_BYTES) are `head`."""
    try:
        values = elements.read_header(file, head, _IDENTITY_TAGS, last=_LAST_OF_IDENTITY).values
        if values.get("SeriesInstanceUID"):
            return _identity(values, "")
    except Unusual:
        pass
    file.seek(0)
    wanted = [*_IDENTITY, *_DIRECTORY, "SOPClassUID", "Modality", "Rows", "Columns", "ImageOrientationPatient"]
    with _quietly():
        dataset, _, _ = _header(file, [*wanted, "ConvolutionKernel"])
        try:
            orientation = attributes.numbers(dataset, "ImageOrientationPatient", 6) or ()
            likeness = [f"{value:.3f}" for value in orientation]
            likeness += [attributes.text(dataset, name) for name in ("Rows", "Columns", "ConvolutionKernel")]
            return _identity(dataset, "/".join(likeness))
        except Exception as error:
            raise NotDicom("DICOM_DAMAGED") from error


def _identity(dataset: Any, likeness: str) -> Identity:
    patient_id, issuer, study, series = (attributes.text(dataset, name) for name in _IDENTITY)
    modality = attributes.text(dataset, "Modality").upper()
    return Identity(
        patient_id=patient_id,
        issuer=issuer,
        study_uid=study,
        series_uid=series,
        likeness="" if series else likeness,
        is_ct=modality == "CT" or (not modality and attributes.text(dataset, "SOPClassUID") in CT_IMAGES),
    )


def read_slices(path: Path) -> list[Slice]:
    """What a file's header says of each of its frames.

    Raises:
        NotDicom: it is no DICOM image, or damaged.
        Refused: SIZE_REFUSED, for a number of frames or a matrix that no CT has.
        OSError: it cannot be read.
    """
    with open_binary(path) as file:
        dataset, syntax, offset = _image_header(file)
        try:
            # pydicom converts values when they are asked for.
            with _quietly() if isinstance(dataset, pydicom.Dataset) else nullcontext():
                image = _image_file(str(path), dataset, syntax, offset)
                return read_frames(image, dataset)
        except (Refused, NotDicom):
            raise
        except Exception as error:
            raise NotDicom("DICOM_DAMAGED") from error


def _image_header(file: BinaryIO) -> tuple[Any, str, int | None]:
    """As `_header`; anything with `get(keyword)` for a data set."""
    try:
        header = elements.read_header(file, file.read(HEAD_BYTES), _IMAGE_TAGS)
        return header.values, header.syntax, header.pixel_offset
    except Unusual:
        file.seek(0)
        with _quietly():
            return _header(file, [*_IMAGE, *_GROUPS])


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
    except ArchiveError:
        raise
    except Exception as error:
        raise NotDicom("DICOM_DAMAGED" if start else "NOT_DICOM") from error
    _check_plausible(dataset, stream, start, syntax)
    if syntax is None:
        implicit, little = encoding
        syntax = IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
    order = ">" if syntax == BIG_ENDIAN else "<"
    stream.seek(position)
    group, element = np.frombuffer(stream.read(4).ljust(4, b"\0"), f"{order}u2").tolist()
    # (Double) Float Pixel Data in a CT image is refused when it is decoded: it has pixels, and is not cut.
    real = element in (0x0008, 0x0009) and attributes.text(dataset, "SOPClassUID") in CT_IMAGES
    if group == 0x7FE0 and (element == 0x0010 or real):
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


def _image_file(path: str, dataset: Any, syntax: str, offset: int | None) -> ImageFile:
    allocated = attributes.integer(dataset, "BitsAllocated", 0)
    stored = attributes.integer(dataset, "BitsStored", allocated)
    signed = attributes.integer(dataset, "PixelRepresentation", 0) == 1
    image = ImageFile(
        path=path,
        syntax=syntax,
        sop_class=attributes.text(dataset, "SOPClassUID"),
        sop_uid=attributes.text(dataset, "SOPInstanceUID"),
        modality=attributes.text(dataset, "Modality").upper(),
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
    if offset is not None and not sizes_possible and image.modality == "CT":
        # What is no size could be something else, a date say: it is not repeated.
        rows, columns, frames = (min(max(n, -1), FRAMES_MAX + 1) for n in (image.rows, image.columns, image.frames))
        raise Refused("SIZE_REFUSED", rows=rows, columns=columns, frames=frames)
    return image


def _padding(dataset: Any, bits: int, signed: bool) -> int | None:
    """PixelPaddingValue as a stored value: writers confuse US and SS, so its bits are read as the pixels' are."""
    value = attributes.number(dataset, "PixelPaddingValue")
    if value is None or not value.is_integer() or not -(2**31) <= value < 2**32 or not 0 < bits <= 32:
        return None
    if value >= 2 ** (bits - 1) and signed:
        value -= 2**bits if value < 2**bits else 2**16
    return int(value)


# ---------------------------------------------------------------------------------------------- pixels


def inflated(image: ImageFile, pixel_bytes: int) -> bytes:
    """A deflated file's data set up to the end of `pixel_bytes` of pixels and a little padding, and no further."""
    with open_binary(image.path, whole=True) as file:
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
    with _named_file(image.path) as path:
        reader.SetFileName(path)
        if not reader.Read():
            raise Refused("PIXELS_DAMAGED", syntax=name)
    picture = reader.GetImage()
    # SWIG hands bytes out as text.
    raw = picture.GetBuffer().encode("utf-8", "surrogateescape")
    if len(raw) != image.frame_bytes or image.bits_allocated not in (8, 16):
        raise Refused("PIXELS_DAMAGED", syntax=name)
    kind = "i" if image.signed else "u"
    return np.frombuffer(raw, f"={kind}{image.bits_allocated // 8}").reshape(image.rows, image.columns)


@contextmanager
def _named_file(path: str) -> Iterator[str]:
    """A path by which a library can open a source file; a member of an archive gets one in memory (Linux only)."""
    if os.path.isfile(path):  # noqa: PTH113
        yield path
        return
    if not hasattr(os, "memfd_create"):
        raise ArchiveError("ARCHIVE_UNSUPPORTED")
    with open_binary(path, whole=True) as member, os.fdopen(os.memfd_create("member"), "wb") as copy:
        shutil.copyfileobj(member, copy)
        copy.flush()
        yield f"/proc/self/fd/{copy.fileno()}"


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
                        with open_binary(image.path, whole=True) as file:
                            self._dataset = pydicom.dcmread(file, specific_tags=["PixelData", *_IMAGE])
                    values, _ = self._decoder.as_array(
                        self._dataset, index=number, raw=True, validate=True, decoding_plugin=plugin
                    )
            except (MemoryError, ArchiveError):
                raise
            except Exception:  # whatever a codec throws at damaged bytes, the next one may know better
                continue
            if values.shape == (image.rows, image.columns) and values.dtype.kind in "iu":
                return values
        raise Refused("PIXELS_DAMAGED", syntax=syntax_name(image.syntax))
