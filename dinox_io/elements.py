"""Header elements of an ordinary DICOM file, read in one pass without pydicom (PS3.5 section 7, annex A).

Invariant: what comes out is what pydicom reads, or `Unusual` is raised and pydicom is to be asked: other transfer
syntaxes than little endian, tags out of order, texts that are not ASCII, functional groups, whatever is damaged. Memory
and time are bounded by the elements that are there, whatever lengths they claim.
"""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from dinox_io.fileformat import DICOMDIR_CLASS, EXPLICIT, IMPLICIT, LONG_VRS, NotDicom, file_meta

HEAD_BYTES = 1 << 13
"""Bytes of a file that are read at once: most headers are shorter."""
_PIXEL_DATA, _PIXEL_GROUP = 0x7FE00010, 0x7FE00000
_FIRST_TAG = 0x0007FFFF
"""What comes before group 0008 is file meta or a DICOMDIR."""
_FUNCTIONAL_GROUPS = range(0x52009229, 0x52009231)
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, b"\xfe\xff\x0d\xe0", 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_VALUE_BYTES_MAX = 1 << 12
_DEPTH_MAX = 16
_SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)
_ENCAPSULATED = frozenset({f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)})
_EXPLICIT = _ENCAPSULATED | {EXPLICIT, "1.2.840.10008.1.2.5"}
_VRS = _SHORT_VRS | LONG_VRS
_NUMBERS = {"DS": float, "IS": int}
_HEAD = struct.Struct("<HH2sH")
_IMPLICIT_HEAD = struct.Struct("<HHL")
_LENGTH = struct.Struct("<L")


class Unusual(Exception):
    """Not a file for this reader; says nothing on whether it is a good one."""


@dataclass(frozen=True, slots=True)
class Header:
    """Values of the wanted elements that have one, by keyword; where the pixel data element begins."""

    values: dict[str, Any]
    syntax: str
    pixel_offset: int | None
    """None: not looked for."""


def read_header(file: BinaryIO, head: bytes, wanted: Mapping[int, tuple[str, str]], last: int | None = None) -> Header:
    """The wanted elements of a file: up to tag `last`, or (None) to its pixel data.

    Args:
        file: open, seekable; left anywhere.
        head: its first bytes, `HEAD_BYTES` if it has so many.
        wanted: tag -> (keyword, VR), VR one of CS, LO, SH, TM, UI (text), DS, IS (text of a number), US, "US or SS".

    Raises:
        Unusual: see above.
        OSError: it cannot be read.
    """
    if head[128:132] != b"DICM":
        raise Unusual
    stream = io.BytesIO(head)
    stream.seek(132)
    try:
        start, syntax, media_class = file_meta(stream, head)
    except NotDicom as error:
        raise Unusual from error
    if (syntax != IMPLICIT and syntax not in _EXPLICIT) or media_class == DICOMDIR_CLASS:
        raise Unusual
    walk = _Walk(file, head, explicit=syntax != IMPLICIT)
    values, offset = walk.top_level(start, wanted, last)
    return Header(values, syntax, offset)


class _Walk:
    """Steps from element to element, with a window on the file: most headers lie in the first one."""

    def __init__(self, file: BinaryIO, head: bytes, *, explicit: bool) -> None:
        self._file, self._explicit = file, explicit
        self._data, self._base = head, 0

    def top_level(
        self, at: int, wanted: Mapping[int, tuple[str, str]], last: int | None
    ) -> tuple[dict[str, Any], int | None]:
        """(values by keyword, offset of the pixel data element) of the data set that begins at `at`."""
        values: dict[str, Any] = {}
        previous = _FIRST_TAG
        while True:
            tag, vr, value_at, size = self._element(at)
            if tag <= previous:
                raise Unusual
            if last is not None and tag > last:
                return values, None
            if tag >= _PIXEL_GROUP or tag in _FUNCTIONAL_GROUPS:
                if tag != _PIXEL_DATA:
                    raise Unusual
                return values, at
            if tag in wanted and size:
                keyword, kind = wanted[tag]
                value = self._value(value_at, size, vr, kind, bool(values.get("PixelRepresentation")))
                if value is not None:
                    values[keyword] = value
            if tag == last:
                return values, None
            previous = tag
            at = value_at + size if size != _UNDEFINED else self._after(value_at, vr, 0)

    def _place(self, at: int, size: int) -> int:
        """Index in the window of `size` bytes at `at` of the file."""
        here = at - self._base
        if here < 0 or here + size > len(self._data):
            self._file.seek(at)
            self._data, self._base, here = self._file.read(HEAD_BYTES), at, 0
            if len(self._data) < size:
                raise Unusual
        return here

    def _element(self, at: int) -> tuple[int, bytes, int, int]:
        """(tag, VR, where the value begins, its length); VR b"" if the syntax is implicit."""
        here = self._place(at, 8)
        if not self._explicit:
            group, element, size = _IMPLICIT_HEAD.unpack_from(self._data, here)
            if self._data[here + 4 : here + 6] in _VRS:
                raise Unusual  # explicit elements in a file that says implicit
            return group << 16 | element, b"", at + 8, size
        group, element, vr, size = _HEAD.unpack_from(self._data, here)
        if vr in _SHORT_VRS:
            return group << 16 | element, vr, at + 8, size
        if vr not in LONG_VRS:
            raise Unusual
        here = self._place(at, 12)
        return group << 16 | element, vr, at + 12, _LENGTH.unpack_from(self._data, here + 8)[0]

    def _after(self, at: int, vr: bytes, depth: int) -> int:
        """Where a sequence of undefined length ends (PS3.5 section 7.5); `at` is its first item."""
        if vr not in (b"SQ", b"") or depth > _DEPTH_MAX:
            raise Unusual
        while True:
            group, element, size = _IMPLICIT_HEAD.unpack_from(self._data, self._place(at, 8))
            at += 8
            tag = group << 16 | element
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM:
                raise Unusual
            at = at + size if size != _UNDEFINED else self._after_item(at, depth)

    def _after_item(self, at: int, depth: int) -> int:
        while True:
            here = self._place(at, 8)
            if self._data[here : here + 4] == _ITEM_END:
                return at + 8
            _, vr, value_at, size = self._element(at)
            at = value_at + size if size != _UNDEFINED else self._after(value_at, vr, depth + 1)

    def _value(self, at: int, size: int, vr: bytes, kind: str, signed: bool) -> Any:
        if size > _VALUE_BYTES_MAX or (vr and vr.decode() not in kind):
            raise Unusual
        here = self._place(at, size)
        raw = self._data[here : here + size]
        if kind in ("US", "US or SS"):
            if size != 2:
                raise Unusual
            return int.from_bytes(raw, "little", signed=vr == b"SS" or (kind != "US" and not vr and signed))
        if not raw.isascii() or b"\x1b" in raw:
            raise Unusual  # pydicom knows character sets
        parts = raw.decode("ascii").rstrip(" \0").split("\\")
        if kind in ("LO", "SH"):
            parts = [part.rstrip(" \0") for part in parts]
        elif kind == "UI":
            parts = [part.strip() for part in parts]
        if parts == [""]:
            return None
        try:
            found = [_NUMBERS[kind](part) for part in parts] if kind in _NUMBERS else parts
        except ValueError as error:
            raise Unusual from error
        return found if len(found) > 1 else found[0]
