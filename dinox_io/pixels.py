"""Stored pixel values of one frame: exactly the bits that the header says are stored, nothing padded, cut or guessed.

Invariant: a frame comes out whole, (rows, columns), masked to BitsStored and sign-extended, or `Refused` is raised
(DICOM PS3.5 section 8 and annex A).
"""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dinox_io import dicom, fileformat
from dinox_io.dicom import ImageFile, Slice
from dinox_io.rules import Refused

_UNDEFINED = 0xFFFFFFFF


class PixelReader:
    """Reads frames of a series, keeping at most one file open; close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._path = ""
        self._native: BinaryIO | None = None
        self._inflated: bytes | None = None
        self._compressed: dicom.CompressedFile | None = None
        self._start = 0
        self.surplus_bytes = 0
        """Bytes beyond the pixels in files read so far, taken for padding."""

    def __enter__(self) -> "PixelReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._native is not None:
            self._native.close()
        self._native = self._inflated = self._compressed = None
        self._path = ""

    def stored(self, piece: Slice) -> np.ndarray:
        """Stored values of a frame: an integer array (rows, columns).

        Raises:
            Refused: PIXELS_TRUNCATED, PIXELS_TOO_LONG, PIXELS_DAMAGED, PIXEL_FORMAT_UNSUPPORTED, DECODER_MISSING …;
                its figures lack the file's number in the series.
            OSError: the file cannot be read.
        """
        image = piece.file
        check_format(image)
        if image.path != self._path:
            self.close()
            self._open(image)
            self._path = image.path
        if self._compressed is not None:
            values = self._compressed.frame(piece.frame)
            if image.syntax == dicom.RLE:
                return unpack(values, image)
            return _within_bits(values, image)
        return unpack(self._native_frame(image, piece.frame), image)

    def _native_frame(self, image: ImageFile, frame: int) -> np.ndarray:
        order = ">" if image.syntax == fileformat.BIG_ENDIAN else "<"
        at = self._start + frame * image.frame_bytes
        if self._inflated is not None:
            raw = self._inflated[at : at + image.frame_bytes]
        else:
            assert self._native is not None
            self._native.seek(at)
            raw = self._native.read(image.frame_bytes)
        if len(raw) != image.frame_bytes:
            raise Refused("PIXELS_TRUNCATED", found=len(raw), expected=image.frame_bytes)
        values = np.frombuffer(raw, f"{order}u{image.bits_allocated // 8}")
        return values.reshape(image.rows, image.columns)

    def _open(self, image: ImageFile) -> None:
        if image.syntax not in fileformat.NATIVE:
            compressed = dicom.CompressedFile(image)
            self._check_fragments(image)
            self._compressed = compressed
            return
        expected = image.frame_bytes * image.frames
        if image.syntax == fileformat.DEFLATED:
            self._inflated = dicom.inflated(image, expected)
            size, head = len(self._inflated), self._inflated[image.pixel_offset : (image.pixel_offset or 0) + 12]
        else:
            self._native = Path(image.path).open("rb")  # noqa: SIM115 (kept open across frames; closed in close())
            size = os.fstat(self._native.fileno()).st_size
            self._native.seek(image.pixel_offset or 0)
            head = self._native.read(12)
        self._start, length = _element(image, head)
        self._check_length(image, length, size - self._start, expected)

    def _check_length(self, image: ImageFile, length: int, present: int, expected: int) -> None:
        surplus = length - expected
        if length == _UNDEFINED or surplus > min(dicom.SURPLUS_BYTES_MAX, image.frame_bytes // 4):
            raise Refused("PIXELS_TOO_LONG", found=length, expected=expected)
        if surplus < 0 or present < length:
            raise Refused("PIXELS_TRUNCATED", found=max(0, min(present, length)), expected=expected)
        self.surplus_bytes += surplus - expected % 2 if surplus else 0  # an odd length is padded to an even one

    @staticmethod
    def _check_fragments(image: ImageFile) -> None:
        """Walk the fragments of encapsulated pixels (PS3.5 A.4): all must be in the file, and a delimiter after."""
        with Path(image.path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(image.pixel_offset or 0)
            at, length = _element(image, file.read(12))
            if length != _UNDEFINED:
                raise Refused("PIXELS_DAMAGED", syntax=dicom.syntax_name(image.syntax))
            while True:
                file.seek(at)
                item = file.read(8)
                if len(item) < 8 or item[:2] != b"\xfe\xff":
                    raise Refused("PIXELS_TRUNCATED", found=size, expected=at + 8)
                if item[2:4] == b"\xdd\xe0":
                    return
                at += 8 + int.from_bytes(item[4:8], "little")


def check_format(image: ImageFile) -> None:
    """Refuse pixels that are not 8, 16 or 32 bit integers with their stored bits inside."""
    allocated, stored, high = image.bits_allocated, image.bits_stored, image.high_bit
    shifted = high != stored - 1 and image.syntax not in fileformat.NATIVE | {dicom.RLE}
    if allocated not in (8, 16, 32) or not 0 < stored <= allocated or not stored - 1 <= high < allocated or shifted:
        raise Refused("PIXEL_FORMAT_UNSUPPORTED", allocated=allocated, stored=stored, high=high)


def _element(image: ImageFile, head: bytes) -> tuple[int, int]:
    """(offset of the value, its length) of the pixel data element whose first 12 bytes are `head`."""
    order = "big" if image.syntax == fileformat.BIG_ENDIAN else "little"
    offset = image.pixel_offset or 0
    if len(head) < 12:
        raise Refused("PIXELS_TRUNCATED", found=0, expected=image.frame_bytes * image.frames)
    # Some writers leave implicit elements in a file that says explicit: then these two bytes are no letters.
    if image.syntax == fileformat.IMPLICIT or not head[4:6].isalpha():
        return offset + 8, int.from_bytes(head[4:8], order)
    return offset + 12, int.from_bytes(head[8:12], order)


def unpack(raw: np.ndarray, image: ImageFile) -> np.ndarray:
    """Values of raw words: the bits stored, up to HighBit; sign-extended if PixelRepresentation is 1 (PS3.5 8.1)."""
    size = raw.dtype.itemsize
    words = raw.view(raw.dtype.str.replace("i", "u")).astype(f"=u{size}", copy=False)
    shift = image.high_bit + 1 - image.bits_stored
    if shift:
        words = words >> shift
    if image.bits_stored < 8 * size:
        words = words & words.dtype.type((1 << image.bits_stored) - 1)
    if not image.signed:
        return words
    sign = 1 << (image.bits_stored - 1)
    if image.bits_stored == 8 * size:
        return words.view(f"=i{size}")
    return (words ^ words.dtype.type(sign)).view(f"=i{size}") - np.array(sign, f"=i{size}")


def _within_bits(values: np.ndarray, image: ImageFile) -> np.ndarray:
    """A codec's values as they are; refused if they need more bits than the header says are stored."""
    low = -(1 << image.bits_stored - 1) if image.signed else 0
    high = low + (1 << image.bits_stored) - 1
    if int(values.min()) < low or int(values.max()) > high:
        raise Refused("PIXELS_DAMAGED", syntax=dicom.syntax_name(image.syntax))
    return values
