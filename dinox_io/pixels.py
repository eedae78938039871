"""Stored pixel values of one frame: exactly the bits that the header says are stored, nothing padded, cut or guessed.

Invariant: a frame comes out whole, (rows, columns), masked to BitsStored and sign-extended, or `Refused` is raised
(DICOM PS3.5 section 8 and annex A).
"""

import os
from typing import BinaryIO

import numpy as np

from dinox_io import dicom, fileformat, rle
from dinox_io.archive import open_binary
from dinox_io.codestream import declared_size
from dinox_io.image import ImageFile, Slice
from dinox_io.rules import Refused

_UNDEFINED = 0xFFFFFFFF


class PixelReader:
    """Reads frames of a series, keeping at most one file open; close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._path = ""
        self._native: BinaryIO | None = None
        self._inflated: bytes | None = None
        self._compressed: dicom.CompressedFile | None = None
        self._fragments: list[tuple[int, int]] = []
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
            return _within_bits(self._compressed.frame(piece.frame), image)
        if image.syntax == dicom.RLE:
            return unpack(self._rle_frame(image, piece.frame), image)
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

    def _rle_frame(self, image: ImageFile, frame: int) -> np.ndarray:
        # A frame is one fragment (PS3.5 A.4.2); a single one that was cut in several can still be told.
        whole = len(self._fragments) == image.frames
        parts = self._fragments[frame : frame + 1] if whole else self._fragments
        # Single bytes, each with its length, are the most that an encoder can make of a frame.
        if not (whole or image.frames == 1) or sum(size for _, size in parts) > 2 * image.frame_bytes + 1024:
            raise _damaged(image)
        assert self._native is not None
        data = b""
        for at, size in parts:
            self._native.seek(at)
            data += self._native.read(size)
        try:
            words = rle.decode_frame(data, image.rows * image.columns, image.bits_allocated // 8)
        except ValueError:
            raise _damaged(image) from None
        return words.reshape(image.rows, image.columns)

    def _open(self, image: ImageFile) -> None:
        if image.syntax == dicom.RLE:
            self._fragments = self._checked_fragments(image)
            self._native = open_binary(image.path, whole=True)
            return
        if image.syntax not in fileformat.NATIVE:
            compressed = dicom.CompressedFile(image)
            self._checked_fragments(image)
            self._compressed = compressed
            return
        expected = image.frame_bytes * image.frames
        if image.syntax == fileformat.DEFLATED:
            self._inflated = dicom.inflated(image, expected)
            size, head = len(self._inflated), self._inflated[image.pixel_offset : (image.pixel_offset or 0) + 12]
        else:
            self._native = open_binary(image.path, whole=True)
            size = self._native.seek(0, os.SEEK_END)
            self._native.seek(image.pixel_offset or 0)
            head = self._native.read(12)
        if image.syntax == fileformat.BIG_ENDIAN and image.bits_allocated == 8 and head[4:6] == b"OW":
            # Bytes in big endian words lie in pairs the other way round (PS3.5 section 8.2): no scanner writes that.
            raise Refused("PIXEL_FORMAT_UNSUPPORTED", allocated=8, stored=image.bits_stored, high=image.high_bit)
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
    def _checked_fragments(image: ImageFile) -> list[tuple[int, int]]:
        """(offset, bytes) of the fragments of encapsulated pixels (PS3.5 A.4), without that of the offset table.

        All must be in the file, a delimiter after them, and a codestream of no other size than the header's.
        """
        with open_binary(image.path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(image.pixel_offset or 0)
            at, length = _element(image, file.read(12))
            if length != _UNDEFINED:
                raise _damaged(image)
            fragments: list[tuple[int, int]] = []
            while True:
                file.seek(at)
                item = file.read(8)
                if len(item) < 8 or item[:2] != b"\xfe\xff":
                    raise Refused("PIXELS_TRUNCATED", found=size, expected=at + 8)
                if item[2:4] == b"\xdd\xe0":
                    return fragments[1:]
                length = int.from_bytes(item[4:8], "little")
                if fragments and image.syntax in dicom.CODESTREAMS:
                    _check_codestream(image, declared_size(file, at + 8, at + 8 + length), first=len(fragments) == 1)
                fragments.append((at + 8, length))
                at += 8 + length


def _damaged(image: ImageFile) -> Refused:
    return Refused("PIXELS_DAMAGED", syntax=dicom.syntax_name(image.syntax))


def _check_codestream(image: ImageFile, size: tuple[int, int, int] | None, *, first: bool) -> None:
    """Refuse a codestream that is of another size than its file's header says, before a codec believes it."""
    if (size is None and first) or (size is not None and size != (image.rows, image.columns, 1)):
        raise _damaged(image)


def check_format(image: ImageFile) -> None:
    """Refuse pixels that are not 8, 16 or 32 bit integers with their stored bits inside."""
    allocated, stored, high = image.bits_allocated, image.bits_stored, image.high_bit
    shifted = high != stored - 1 and image.syntax not in fileformat.NATIVE | {dicom.RLE}
    if allocated not in (8, 16, 32) or not 0 < stored <= allocated or not stored - 1 <= high < allocated or shifted:
        # In a number that is no number of bits something else could stand: a date, say.
        bits = {"allocated": allocated, "stored": stored, "high": high}
        raise Refused("PIXEL_FORMAT_UNSUPPORTED", **{name: min(max(value, -1), 99) for name, value in bits.items()})


def _element(image: ImageFile, head: bytes) -> tuple[int, int]:
    """(offset of the value, its length) of the pixel data element whose first 12 bytes are `head`."""
    order = "big" if image.syntax == fileformat.BIG_ENDIAN else "little"
    offset = image.pixel_offset or 0
    if len(head) < 12:
        raise Refused("PIXELS_TRUNCATED", found=0, expected=image.frame_bytes * image.frames)
    if int.from_bytes(head[2:4], order) != 0x0010:
        raise Refused("FLOAT_PIXELS")
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
        raise _damaged(image)
    return values
