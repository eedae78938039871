"""The seek table that ends a file of the Zstandard Seekable Format: sizes and checksum of each frame before it.

    skippable frame { z x (u32 compressed, u32 decompressed, u32 checksum), u32 z, u8 0x80, u32 magic }, little endian

Invariant: a table that is accepted accounts for every byte of its member, so its offsets cannot lead outside of it.
"""

from __future__ import annotations

import struct

import numpy as np

from dinox_io.errors import ShardError
from dinox_io.storage import ShardFile, read_bytes

SEEK_ENTRY = np.dtype([("compressed", "<u4"), ("decompressed", "<u4"), ("checksum", "<u4")])
_SKIPPABLE_MAGIC, _SEEKABLE_MAGIC, _CHECKSUM_FLAG = 0x184D2A5E, 0x8F92EAB1, 0x80
_SEEK_HEADER = struct.Struct("<II")
_SEEK_FOOTER = struct.Struct("<IBI")


def seek_table(entries: list[tuple[int, int, int]]) -> bytes:
    """The skippable frame that ends a Zstandard Seekable file; entries are (compressed, decompressed, checksum)."""
    body = np.array(entries, dtype=SEEK_ENTRY).tobytes() + _SEEK_FOOTER.pack(
        len(entries), _CHECKSUM_FLAG, _SEEKABLE_MAGIC
    )
    return _SEEK_HEADER.pack(_SKIPPABLE_MAGIC, len(body)) + body


def seek_table_bytes(num_slices: int) -> int:
    """Size of the seek table of a volume of so many slices."""
    return _SEEK_HEADER.size + SEEK_ENTRY.itemsize * num_slices + _SEEK_FOOTER.size


def frames_of_table(table: bytes) -> np.ndarray:
    """SEEK_ENTRY (z,) of the bytes of a seek table whose size was checked."""
    count = (len(table) - _SEEK_HEADER.size - _SEEK_FOOTER.size) // SEEK_ENTRY.itemsize
    return np.frombuffer(table, SEEK_ENTRY, count, _SEEK_HEADER.size)


def read_seek_table(file: ShardFile, start: int, size: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, bytes]:
    """SEEK_ENTRY (z,) of the body at `start`, checked against its size and the volume's shape; and its bytes."""
    length = seek_table_bytes(shape[0])
    if length > size:
        raise ShardError(f"its data has {size} bytes, fewer than its seek table")
    table = read_bytes(file, start + size - length, start + size)
    frames = frames_of_table(table)
    frame = (_SKIPPABLE_MAGIC, length - _SEEK_HEADER.size)
    if (
        _SEEK_HEADER.unpack_from(table) != frame
        or _SEEK_FOOTER.unpack_from(table, length - _SEEK_FOOTER.size) != (shape[0], _CHECKSUM_FLAG, _SEEKABLE_MAGIC)
        or np.any(frames["decompressed"] != 2 * shape[1] * shape[2])
        or np.any(frames["compressed"] == 0)
        or int(frames["compressed"].sum(dtype=np.int64)) + length != size
    ):
        raise ShardError("its seek table does not fit its data")
    return frames, table
