"""Source files, wherever they lie: on disk, or inside a zip archive, which is read in place and never extracted.

Invariant: an archive is untrusted. A member is at most what its directory declares, and inflated at most to
`MEMBER_BYTES_MAX`; wrong sizes, overlaps or checksums are `ArchiveError`; names in an archive are labels and never
lead to a file on disk.
The path of a member is the archive's path, a slash, and its label: a regular file has no path below it, so that no
other file can be meant. Layout: APPNOTE.TXT of the zip format, sections 4.3 to 4.5 (zip64 included).
"""

import errno
import io
import os
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MEMBER_BYTES_MAX = 4 << 30
"""A deflated member is inflated to here and no further: it lies in memory, beside a volume of as much again."""
MEMBERS_MAX = 1_000_000
LABEL_CHARACTERS_MAX = 300
_CHUNK_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 13
_RATIO_MAX = 1032
"""Deflate cannot do better: what declares more is a lie."""
_FULL_32, _FULL_16 = 0xFFFFFFFF, 0xFFFF
_END_BYTES = 22
"""Of the end record, without its comment."""
_ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")
"""Of a directory entry: signature, flags, method, CRC-32, two sizes, lengths of name, extra and comment, offset."""


class ArchiveError(OSError):
    """A member cannot be had; `code` is ARCHIVE_DAMAGED, ARCHIVE_ENCRYPTED or ARCHIVE_UNSUPPORTED."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Member:
    """An entry of an archive's directory: sizes in bytes, `offset` of its local header in the file."""

    flags: int
    method: int
    checksum: int
    stored_bytes: int
    size_bytes: int
    offset: int


def is_zip(head: bytes) -> bool:
    """Whether a file begins as a zip archive does (an empty one too)."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def ends_as_zip(path: str) -> bool:
    """Whether a file that begins as something else ends as a zip archive does. OSError if it cannot be read.

    The last 22 bytes tell, and of programs, which may be signed behind it, the last 64 KiB: most files are neither,
    and this is asked about every one that is no scan.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        program = file.read(4).startswith((b"MZ", b"#!", b"\x7fELF"))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES - (_FULL_16 if program else 0)))
        tail = file.read()
    return b"PK\x05\x06" in tail if program else tail[:4] == b"PK\x05\x06" and len(tail) == _END_BYTES


def is_office(head: bytes) -> bool:
    """Whether a zip archive is a document, by the name of its first member (Office Open XML, OpenDocument, EPUB)."""
    return head[30:49] == b"[Content_Types].xml" or head[30:38] == b"mimetype"


def is_other(head: bytes) -> bool:
    """Whether a file is an archive that is not opened: tar (but a shard of ours), 7z, rar, xz, bzip2."""
    if head[257:262] == b"ustar":
        return not head.startswith(b"__dinox__/")
    magics = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ\0")
    return head.startswith(magics) or (head[:3] == b"BZh" and head[4:10] == b"1AY&SY")


def open_binary(path: str | Path, *, whole: bool = False) -> BinaryIO:
    """A source file for reading, seekable; `path` may be that of a member, which is inflated as far as it is read.

    `whole`: a member's checksum is compared before anything is handed out (a file on disk has none).

    Raises:
        ArchiveError: the archive is damaged or encrypted, or holds no such member.
        OSError: it cannot be opened.
    """
    try:
        return open(path, "rb")  # noqa: PTH123 (the caller closes it; Path.open costs twice as much)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        found = _open_member(str(path), whole)
        if found is None:
            raise
        return found


def members(path: str) -> list[tuple[str, int]]:
    """(path, bytes) of the files in a zip archive, in the order of its directory.

    Raises:
        ArchiveError: ARCHIVE_DAMAGED.
        OSError: it cannot be read.
    """
    archive = _opened(path)
    return [(f"{path}/{label}", member.size_bytes) for label, member in archive.members.items()]


class _Archive:
    """An open zip archive and its directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.file)
        self.state = status.st_ino, status.st_size, status.st_mtime_ns
        self.size_bytes = status.st_size
        try:
            self.members = self._directory()
        except (struct.error, IndexError, UnicodeError) as error:
            raise ArchiveError("ARCHIVE_DAMAGED") from error

    def __del__(self) -> None:  # members that are still open keep the archive, and with it the descriptor, alive
        if hasattr(self, "file"):
            os.close(self.file)

    def changed(self) -> bool:
        """Whether another file lies at its path by now."""
        status = os.stat(self.path)  # noqa: PTH116
        return self.state != (status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, at: int, size: int) -> bytes:
        """Exactly those bytes of the archive."""
        data = os.pread(self.file, size, at) if 0 <= at <= self.size_bytes - size else b""
        if len(data) != size:
            raise ArchiveError("ARCHIVE_DAMAGED")
        return data

    def _directory(self) -> dict[str, Member]:
        entries, size, at, shift = self._directory_place()
        if entries > MEMBERS_MAX:
            raise ArchiveError("ARCHIVE_DAMAGED")
        found: dict[str, Member] = {}
        end, stored_bytes = at + size, 0
        block, base = b"", at
        for _ in range(entries):
            # The largest entry is below 256 KiB: three texts of 64 KiB.
            if (at - base + (1 << 18) > len(block) and base + len(block) < end) or not block:
                block, base = self.read(at, min(1 << 20, end - at)), at
            name, member, entry_bytes = _entry(block, at - base, shift)
            at += entry_bytes
            stored_bytes += member.stored_bytes
            if at > end or member.offset + 30 + member.stored_bytes > self.size_bytes:
                raise ArchiveError("ARCHIVE_DAMAGED")
            if member.size_bytes or not name.endswith("/"):
                found[_label(name, found)] = member
        # Entries that are not counted would be lost without a word; members that share their bytes are a bomb.
        if at != end or stored_bytes > self.size_bytes:
            raise ArchiveError("ARCHIVE_DAMAGED")
        return found

    def _directory_place(self) -> tuple[int, int, int, int]:
        """(entries, bytes, offset) of the central directory, and the bytes before the archive that no offset counts."""
        tail_bytes = min(self.size_bytes, _END_BYTES + _FULL_16)
        tail = self.read(self.size_bytes - tail_bytes, tail_bytes)
        end = tail.rfind(b"PK\x05\x06")
        if end < 0:
            raise ArchiveError("ARCHIVE_DAMAGED")
        entries, size, at, comment_bytes = struct.unpack_from("<HLLH", tail, end + 10)
        if end + _END_BYTES + comment_bytes > tail_bytes:
            raise ArchiveError("ARCHIVE_DAMAGED")
        directory_end = self.size_bytes - tail_bytes + end
        if entries == _FULL_16 or _FULL_32 in (size, at):
            locator = self.read(directory_end - 20, 20)
            if locator[:4] == b"PK\x06\x07":
                record_at, before = int.from_bytes(locator[8:16], "little"), directory_end - 20 - 56
                if self._magic(record_at) != b"PK\x06\x06" == self._magic(before):
                    record_at = directory_end = before  # something stands before the archive
                record = self.read(record_at, 56)
                if record[:4] != b"PK\x06\x06":
                    raise ArchiveError("ARCHIVE_DAMAGED")
                entries, size, at = struct.unpack_from("<QQQ", record, 32)
        if not entries or self._magic(at) == b"PK\x01\x02":
            return entries, size, at, 0
        shift = directory_end - size - at
        if shift < 0:
            raise ArchiveError("ARCHIVE_DAMAGED")
        return entries, size, at + shift, shift

    def _magic(self, at: int) -> bytes:
        return self.read(at, 4) if 0 <= at <= self.size_bytes - 4 else b""


def _entry(block: bytes, at: int, shift: int) -> tuple[str, Member, int]:
    """(name, member, bytes of the entry) of the directory entry at `at`; see `_directory_place` for `shift`."""
    magic, flags, method, checksum, stored, size, *lengths, offset = _ENTRY.unpack_from(block, at)
    name_bytes, extra_bytes, _ = lengths
    extra_at = at + _ENTRY.size + name_bytes
    entry_bytes = _ENTRY.size + sum(lengths)
    if magic != b"PK\x01\x02" or at + entry_bytes > len(block):
        raise ArchiveError("ARCHIVE_DAMAGED")
    name = block[at + _ENTRY.size : extra_at].decode("utf-8" if flags & 0x800 else "cp437")
    wide = _zip64(block[extra_at : extra_at + extra_bytes])
    size, stored, offset = (next(wide) if value == _FULL_32 else value for value in (size, stored, offset))
    return name, Member(flags, method, checksum, stored, size, offset + shift), entry_bytes


def _zip64(extra: bytes) -> Iterator[int]:
    """The 8-byte values of the zip64 field (4.5.3): those that did not fit into the entry, in its order."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            yield from (value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + size // 8 * 8]))
        extra = extra[4 + size :]
    raise ArchiveError("ARCHIVE_DAMAGED")  # one more was asked for than there are


def _label(name: str, taken: Collection[str]) -> str:
    """A path below the archive that names this member alone, whatever its name tries."""
    parts = [part for part in name.split("\0")[0].split("/") if part not in ("", ".", "..")]
    label = "/".join(parts)[:LABEL_CHARACTERS_MAX].rstrip("/") or "member"
    if label in taken:
        label = f"{label}~{len(taken)}"
    if label in taken:
        raise ArchiveError("ARCHIVE_DAMAGED")
    return label


_last: list[_Archive] = []
"""The archive that was used last stays open: the files of a series lie in one."""


def _opened(path: str) -> _Archive:
    if not (_last and _last[0].path == path and not _last[0].changed()):
        _last[:] = [_Archive(path)]
    return _last[0]


def _open_member(path: str, whole: bool) -> BinaryIO | None:
    """The member at a path below a regular file; None if there is no regular file above."""
    top = path
    while not os.path.isfile(top):  # noqa: PTH113
        if os.path.dirname(top) == top:  # noqa: PTH120
            return None
        top = os.path.dirname(top)  # noqa: PTH120
    archive = _opened(top)
    member = archive.members.get(path[len(top) + 1 :])
    if member is None:
        raise ArchiveError("ARCHIVE_DAMAGED")
    stream = _MemberStream(path, archive, member)
    if whole:
        stream.check()
    return io.BufferedReader(stream, _BUFFER_BYTES)


class _MemberStream(io.RawIOBase):
    """A member's bytes: stored ones in place, deflated ones inflated as far as they were read, and kept."""

    def __init__(self, path: str, archive: _Archive, member: Member) -> None:
        self.name = path  # as a file on disk has: pydicom asks for it
        if member.flags & 0x41:
            raise ArchiveError("ARCHIVE_ENCRYPTED")
        if member.method not in (0, 8):
            raise ArchiveError("ARCHIVE_UNSUPPORTED")
        possible = member.size_bytes == member.stored_bytes
        if member.method:
            possible = member.size_bytes <= member.stored_bytes * _RATIO_MAX
        if not possible:
            raise ArchiveError("ARCHIVE_DAMAGED")
        head = archive.read(member.offset, 30)
        name_bytes, extra_bytes = struct.unpack_from("<HH", head, 26)
        if head[:4] != b"PK\x03\x04":
            raise ArchiveError("ARCHIVE_DAMAGED")
        self._archive, self._member = archive, member
        self._at = 0
        self._source = member.offset + 30 + name_bytes + extra_bytes
        self._source_end = self._source + member.stored_bytes
        self._engine = zlib.decompressobj(-zlib.MAX_WBITS) if member.method else None
        self._inflated = bytearray()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size_bytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._bytes(self._at, min(self._at + len(buffer), self._member.size_bytes))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _bytes(self, start: int, end: int) -> bytes | bytearray:
        if start >= end:
            return b""
        if self._engine is None:
            return self._archive.read(self._source + start, end - start)
        self._inflate(end)
        return self._inflated[start:end]

    def _inflate(self, end: int) -> None:
        engine, size = self._engine, self._member.size_bytes
        assert engine is not None
        if end > MEMBER_BYTES_MAX:
            raise ArchiveError("ARCHIVE_UNSUPPORTED")
        while len(self._inflated) < end:
            chunk = engine.unconsumed_tail or self._next_chunk()
            try:
                self._inflated += engine.decompress(chunk, min(_CHUNK_BYTES, size - len(self._inflated)))
            except zlib.error as error:
                raise ArchiveError("ARCHIVE_DAMAGED") from error
            if len(self._inflated) < size and (engine.eof or not chunk):
                raise ArchiveError("ARCHIVE_DAMAGED")  # ends before its declared size

    def _next_chunk(self) -> bytes:
        size = min(_CHUNK_BYTES, self._source_end - self._source)
        chunk = self._archive.read(self._source, size)
        self._source += size
        return chunk

    def check(self) -> None:
        """Read the member to its end and compare its CRC-32; ArchiveError if it differs."""
        found, size = 0, self._member.size_bytes
        if self._engine is not None and size > MEMBER_BYTES_MAX:
            raise ArchiveError("ARCHIVE_UNSUPPORTED")
        for start in range(0, size, _CHUNK_BYTES):
            found = zlib.crc32(self._bytes(start, min(start + _CHUNK_BYTES, size)), found)
        if found != self._member.checksum:
            raise ArchiveError("ARCHIVE_DAMAGED")
