"""How large a compressed picture says it is: JPEG (T.81 B.2), JPEG-LS (T.87 C.2) and JPEG 2000 (T.800 A.5) headers.

Invariant: reads a bounded number of bytes and decodes nothing. Codecs allocate what a codestream asks for, so that is
compared with the DICOM header before one of them sees it.
"""

import struct
from typing import BinaryIO

_MARKERS_MAX = 200
_SEARCH_BYTES = 4096
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
"""SOF markers: C0 to CF without DHT, JPG and DAC; F7 is that of JPEG-LS."""


def declared_size(file: BinaryIO, at: int, end: int) -> tuple[int, int, int] | None:
    """(rows, columns, components) of the codestream that begins at `at` and ends before `end`.

    (0, 0, 0) if its header does not say; None if no codestream begins there.
    """
    file.seek(at)
    head = file.read(min(_SEARCH_BYTES, max(0, end - at)))
    if head[:2] == b"\xff\xd8":
        return _jpeg(file, at + 2, end)
    boxed = head[4:8] == b"jP  "
    start = head.find(b"\xff\x4f\xff\x51") if boxed else 0
    if head[start : start + 4] != b"\xff\x4f\xff\x51" or start < 0:
        return (0, 0, 0) if boxed else None
    try:
        right, bottom, left, top = struct.unpack_from(">4L", head, start + 8)
        (components,) = struct.unpack_from(">H", head, start + 40)
    except struct.error:
        return 0, 0, 0
    return bottom - top, right - left, components


def _jpeg(file: BinaryIO, at: int, end: int) -> tuple[int, int, int]:
    for _ in range(_MARKERS_MAX):
        file.seek(at)
        head = file.read(min(10, max(0, end - at)))
        if len(head) < 10 or head[0] != 0xFF or head[1] in (0xD9, 0xDA):
            break
        if head[1] in _FRAMES:
            rows, columns, components = struct.unpack_from(">HHB", head, 5)
            return rows, columns, components
        if head[1] == 0xFF:  # a fill byte
            at += 1
        elif head[1] == 0x01 or 0xD0 <= head[1] <= 0xD7:  # markers without a length
            at += 2
        else:
            at += 2 + int.from_bytes(head[2:4], "big")
    return 0, 0, 0
