"""The outside of a DICOM file (PS3.10): preamble, file meta information, deflated data sets; without pydicom.

Invariant: reads a bounded number of bytes whatever the file claims, so that nothing hostile reaches a parser unseen.
"""

import zlib
from typing import BinaryIO

IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99",
)  # fmt: skip
NATIVE = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED})
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
META_BYTES_MAX = 1 << 20

LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations whose length has four bytes (PS3.5 section 7.1.2)."""


class NotDicom(Exception):
    """The file is not a DICOM image; `code` is NOT_DICOM, DICOMDIR or DICOM_DAMAGED."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def file_meta(file: BinaryIO, head: bytes) -> tuple[int, str | None, str]:
    """(where the data set begins, transfer syntax, media storage SOP class) of DICOM PS3.10 section 7.1.

    (0, None, "") for a plausible data set without preamble and meta.
    """
    if head[128:132] != b"DICM":
        if _plausible_headless(head):
            return 0, None, ""
        raise NotDicom("NOT_DICOM")
    block = file.read(4096)
    found: dict[int, bytes] = {}
    at = 0
    while block[at : at + 2] == b"\x02\x00":
        if block[at + 4 : at + 6] in LONG_VRS:
            size, value = int.from_bytes(block[at + 8 : at + 12], "little"), at + 12
        else:
            size, value = int.from_bytes(block[at + 6 : at + 8], "little"), at + 8
        if value + size + 12 > len(block):  # a long meta, or a lie
            block += file.read(META_BYTES_MAX - len(block))
        if not block[at + 4 : at + 6].isalpha() or value + size > len(block):
            raise NotDicom("DICOM_DAMAGED")
        found[int.from_bytes(block[at + 2 : at + 4], "little")] = block[value : value + size]
        at = value + size
    syntax = found.get(0x0010, b"").rstrip(b"\0 ").decode("ascii", "replace")
    return 132 + at, syntax or None, found.get(0x0002, b"").rstrip(b"\0 ").decode("ascii", "replace")


def _plausible_headless(head: bytes) -> bool:
    """Whether a file without the magic begins like a data set: an element of group 0002 or 0008 of a sane length."""
    if len(head) < 16 or head[:2] not in (b"\x08\x00", b"\x02\x00") or head[3] > 0x10:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return explicit or int.from_bytes(head[4:8], "little") <= 1024


def inflate(file: BinaryIO, start: int, limit: int) -> bytes:
    """At most `limit` bytes of a deflated data set (a bomb stops there)."""
    file.seek(start)
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    parts: list[bytes] = []
    size = 0
    try:
        while size < limit and not engine.eof and (chunk := engine.unconsumed_tail or file.read(1 << 16)):
            parts.append(engine.decompress(chunk, limit - size))
            size += len(parts[-1])
    except zlib.error as error:
        raise NotDicom("DICOM_DAMAGED") from error
    return b"".join(parts)
