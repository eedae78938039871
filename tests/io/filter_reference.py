"""The filters of docs/format.md word by word, one value at a time: what both tiers are compared with."""

import struct

import numpy as np


def int16(value: int) -> int:
    """Modulo 2^16, into the range of int16."""
    return (value + 32768) % 65536 - 32768


def reference_hilp(rows: list[list[int]]) -> bytes:
    height, width = len(rows), len(rows[0])

    def predicted(y: int, distance: int) -> list[int]:
        up = rows[y - distance]
        down = rows[y + distance] if y + distance < height else up
        return [int16(a + b) >> 1 for a, b in zip(up, down, strict=True)]

    residual = [rows[y] for y in range(0, height, 4)]
    for first, stride, distance in ((2, 4, 2), (1, 2, 1)):
        for y in range(first, height, stride):
            residual.append([int16(a - b) for a, b in zip(rows[y], predicted(y, distance), strict=True)])
    low, high = bytearray(), bytearray()
    for row in residual:
        for x in range(width):
            value = int16(row[x] - (row[x - 1] if x else 0))
            low_byte = (value + 128) % 256 - 128
            low.append(low_byte % 256)
            high.append((int16(value - low_byte) >> 8) % 256)
    return bytes(low + high)


def reference(slice_hu: np.ndarray, name: str) -> bytes:
    rows = [[int(value) for value in row] for row in slice_hu]
    if name == "hilp":
        return reference_hilp(rows)
    values = [value % 65536 for row in rows for value in row]
    if name == "planes":
        return bytes(value % 256 for value in values) + bytes(value // 256 for value in values)
    return b"".join(struct.pack("<H", value) for value in values)
