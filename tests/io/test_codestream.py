"""Compressed pictures of another size than the DICOM header says are refused before a codec allocates what they ask."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGLossless, JPEGLSLossless

from dinox_io.codestream import declared_size
from tests.io.dicom_factory import COLUMNS, ROWS, write_series
from tests.io.jpeg_file import fragments
from tests.io.series_reading import code_of

APPLICATION = b"\xff\xe0\x00\x10" + bytes(14)
TABLE = b"\xff\xff\xc4\x00\x05abc"
"""A Huffman table, with a fill byte before it."""


def jpeg(rows: int, columns: int, *, marker: int = 0xC3, components: int = 1) -> bytes:
    frame = struct.pack(">BBHBHHB", 0xFF, marker, 11, 12, rows, columns, components)
    return b"\xff\xd8" + APPLICATION + TABLE + frame + b"\x01\x11\x00\xff\xda"


def jpeg_2000(rows: int, columns: int, left: int = 0) -> bytes:
    sizes = struct.pack(">8L", columns + left, rows, left, 0, columns, rows, 0, 0)
    return b"\xff\x4f\xff\x51" + struct.pack(">HH", 41, 0) + sizes + struct.pack(">H", 1) + b"\x0b\x01\x01"


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (jpeg(7, 9), (7, 9, 1)),
        (jpeg(7, 9, marker=0xF7), (7, 9, 1)),
        (jpeg(7, 9, marker=0xC1, components=3), (7, 9, 3)),
        (jpeg_2000(7, 9), (7, 9, 1)),
        (jpeg_2000(7, 9, left=5), (7, 9, 1)),
        (bytes(4) + b"jP  " + bytes(77) + jpeg_2000(7, 9), (7, 9, 1)),
        (b"\xff\xd8" + APPLICATION + b"\xff\xda", (0, 0, 0)),
        (b"\xff\xd8", (0, 0, 0)),
        (jpeg_2000(7, 9)[:30], (0, 0, 0)),
        (b"\xff\xd8" + 500 * TABLE, (0, 0, 0)),
        (bytes(4) + b"jP  " + bytes(77), (0, 0, 0)),
        (b"no codestream", None),
        (b"", None),
    ],
)
def test_sizes_are_read_from_headers(data: bytes, size: tuple[int, int, int] | None) -> None:
    assert declared_size(io.BytesIO(b"before" + data + b"\xff\xc3 after"), 6, 6 + len(data)) == size


@pytest.mark.parametrize("size", [(ROWS, COLUMNS + 1), (COLUMNS, ROWS), (65000, 65000)])
@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLSLossless, JPEG2000Lossless])
def test_a_picture_of_another_size_never_reaches_a_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, size: tuple[int, int]
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("a codec was asked")

    monkeypatch.setattr("dinox_io.dicom.CompressedFile.__init__", lambda *_: None)
    monkeypatch.setattr("dinox_io.dicom.CompressedFile.frame", decode)
    data = jpeg_2000(*size) if syntax == JPEG2000Lossless else jpeg(*size)
    write_series(tmp_path, 3, change=lambda _, dataset: fragments(dataset, syntax, [data]))
    assert code_of(tmp_path) == "PIXELS_DAMAGED"


def test_bytes_in_big_endian_words_are_refused(tmp_path: Path) -> None:
    def change(_: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = np.arange(ROWS * COLUMNS, dtype=np.uint8).tobytes()

    write_series(tmp_path, 3, change=change)
    assert code_of(tmp_path) == "PIXEL_FORMAT_UNSUPPORTED"
