"""The shard: volumes in a plain USTAR archive, written deterministically and read without trust (docs/format.md).

    __dinox__/shard.json, then per volume KEY.json, KEY.hu16.zst (one zstd frame a slice, then a seek table)

Invariant: the same volumes in the same order are the same bytes. The reader accepts the one spelling the writer has:
a header that differs by a bit, a member out of order, a size that does not add up is ShardError; nothing is extracted.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinox_io import hounsfield
from dinox_io.atomic import AtomicFile
from dinox_io.canonical import canonical_json, parse_json_object
from dinox_io.codec import SliceEncoder
from dinox_io.errors import ShardError
from dinox_io.record import FORMAT_VERSION, ID_PATTERN, META_SUFFIX, VolumeMeta, expect, parse_meta, record_of
from dinox_io.seekable import read_seek_table, seek_table, seek_table_bytes
from dinox_io.storage import ShardFile, read_bytes
from dinox_io.volume import Volume

FORMAT = "dinox-shard"
PACKER = "dinox_io 0.1.0"
HEAD_NAME = "__dinox__/shard.json"
BODY_SUFFIX = ".hu16.zst"

BLOCK = 512
END_BYTES = 2 * BLOCK
MAX_MEMBER_BYTES = 8**11 - 1  # the eleven octal digits of a USTAR size
MAX_HEAD_BYTES = 1 << 16
MAX_META_BYTES = 1 << 26

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

# --- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedVolume:
    """A volume as the bytes of its two members, and what the manifest tells of it. Small enough to pickle."""

    id: str
    patient: str
    series: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    digest: str
    """sha256 of the int16 little-endian HU in C order."""
    meta: bytes
    """KEY.json, canonical JSON."""
    body: bytes
    """KEY.hu16.zst, its seek table included."""
    histogram: np.ndarray
    """int64 (4096,), bins of 16 HU from -32768."""


@dataclass(frozen=True, kw_only=True)
class VolumeSummary:
    """What the manifest says of one volume of a shard. Offsets in bytes from the start of the shard."""

    id: str
    patient: str
    series: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    digest: str
    offset: int
    """Of the tar header of KEY.json."""
    meta_bytes: int
    body_bytes: int
    meta_sha256: str
    seek_table_sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """A finished shard as the manifest will list it."""

    name: str
    size: int
    sha256: str
    volumes: tuple[VolumeSummary, ...]
    histogram: np.ndarray
    """int64 (4096,), the sum over its volumes."""


def encode_volume(volume: Volume, *, filter: str = "hilp", level: int = 1) -> EncodedVolume:
    """Compress a volume slice by slice. The same input gives the same bytes.

    Raises ValueError for an unknown filter, an id that is no member name, or facts that take a reserved name.
    """
    encoder = SliceEncoder(filter, level)
    # A frame is let go once it is written: a list of them, joined at the end, would hold the volume twice.
    body, frames = io.BytesIO(), []
    for slice_hu in volume.hu:
        frame = encoder.encode(slice_hu)
        body.write(frame.data)
        frames.append((len(frame.data), frame.size, frame.checksum))
    body.write(seek_table(frames))
    digest = hounsfield.volume_digest(volume.hu)
    shape = (int(volume.hu.shape[0]), int(volume.hu.shape[1]), int(volume.hu.shape[2]))
    spacing_mm = (float(volume.spacing_mm[0]), float(volume.spacing_mm[1]), float(volume.spacing_mm[2]))
    meta = record_of(volume, filter=filter, digest=digest)
    encoded = EncodedVolume(
        id=volume.id,
        patient=volume.patient,
        series=volume.series,
        shape=shape,
        spacing_mm=spacing_mm,
        digest=digest,
        meta=meta,
        body=body.getvalue(),
        histogram=hounsfield.histogram(volume.hu),
    )
    if len(encoded.meta) > MAX_META_BYTES or len(encoded.body) > MAX_MEMBER_BYTES:
        raise ValueError(f"volume {volume.id}: {len(encoded.body)} bytes are more than a member of a shard can hold")
    return encoded


def member_header(name: str, size: int) -> bytes:
    """The one USTAR header that a member of this name and size has: mode 644, owner and time 0."""
    information = tarfile.TarInfo(name)
    information.size = size
    return information.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class ShardWriter:
    """Writes one shard under a temporary name; `finish()` gives it its own, `abort()` leaves nothing.

    As a context manager it aborts unless it was finished. Attribute `size_bytes`: its size, were it finished now.
    """

    def __init__(self, path: Path, *, config_digest: str) -> None:
        path = Path(path)
        if not NAME_PATTERN.fullmatch(path.name):
            raise ValueError(f"{path.name!r} cannot name a shard")
        self._name, self._digest, self._written = path.name, hashlib.sha256(), 0
        self._volumes: list[VolumeSummary] = []
        self._histogram = np.zeros(hounsfield.HISTOGRAM_BINS, np.int64)
        self._output = AtomicFile(path)
        self._open = True
        head = {"format": FORMAT, "version": FORMAT_VERSION, "packer": PACKER, "config_digest": config_digest}
        self._add_member(HEAD_NAME, canonical_json(head))

    @property
    def size_bytes(self) -> int:
        return self._written + END_BYTES

    @staticmethod
    def member_bytes(encoded: EncodedVolume) -> int:
        """By how much `add(encoded)` makes the shard grow."""
        return 2 * BLOCK + _padded(len(encoded.meta)) + _padded(len(encoded.body))

    def add(self, encoded: EncodedVolume) -> None:
        """Append a volume. ValueError if its id is in the shard already; OSError if the disk is full."""
        if any(encoded.id == volume.id for volume in self._volumes):
            raise ValueError(f"volume {encoded.id} is in {self._name} already")
        table = encoded.body[len(encoded.body) - seek_table_bytes(encoded.shape[0]) :]
        self._volumes.append(
            VolumeSummary(
                id=encoded.id,
                patient=encoded.patient,
                series=encoded.series,
                shape=encoded.shape,
                spacing_mm=encoded.spacing_mm,
                digest=encoded.digest,
                offset=self._written,
                meta_bytes=len(encoded.meta),
                body_bytes=len(encoded.body),
                meta_sha256=hashlib.sha256(encoded.meta).hexdigest(),
                seek_table_sha256=hashlib.sha256(table).hexdigest(),
            )
        )
        self._add_member(encoded.id + META_SUFFIX, encoded.meta)
        self._add_member(encoded.id + BODY_SUFFIX, encoded.body)
        self._histogram += encoded.histogram

    def finish(self) -> ShardSummary:
        """Sync, rename, sync the folder. OSError leaves neither the shard nor a temporary file."""
        self._open = False
        try:
            self._write(bytes(END_BYTES))
        except BaseException:
            self._output.abort()
            raise
        self._output.commit()
        return ShardSummary(
            name=self._name,
            size=self._written,
            sha256=self._digest.hexdigest(),
            volumes=tuple(self._volumes),
            histogram=self._histogram,
        )

    def abort(self) -> None:
        """Remove what was written. Nothing happens if the shard is finished or aborted already."""
        if self._open:
            self._open = False
            self._output.abort()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _add_member(self, name: str, data: bytes) -> None:
        self._write(member_header(name, len(data)))
        self._write(data)
        self._write(bytes(_padded(len(data)) - len(data)))

    def _write(self, data: bytes) -> None:
        self._output.file.write(data)
        self._digest.update(data)
        self._written += len(data)


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One volume as its tar headers, KEY.json and seek table describe it; nothing of it decoded."""

    meta: VolumeMeta
    offset: int
    """Of the tar header of KEY.json, in bytes from the start of the shard."""
    body_offset: int
    """Of the first zstd frame."""
    frames: np.ndarray
    """SEEK_ENTRY (z,): compressed and decompressed bytes and checksum of each slice's frame."""
    meta_bytes: int
    meta_sha256: str
    seek_table_sha256: str


def read_shard_index(file: ShardFile, size: int) -> tuple[ShardEntry, ...]:
    """All volumes of a shard from its tar headers, KEY.json and seek tables; no pixel is decoded.

    Args:
        file: the shard. size: the bytes that the manifest says it has.

    Raises:
        ShardError: anything that the writer would not have written.
    """
    if file.size != size:
        raise ShardError(f"has {file.size} bytes where the manifest says {size}", file=file.name)
    if size % BLOCK or size < END_BYTES or any(read_bytes(file, size - END_BYTES, size)):
        raise ShardError("does not end with the two empty blocks of an archive", file=file.name)
    reader = ShardReader(file, size - END_BYTES)
    reader.read_head()
    volumes: list[ShardEntry] = []
    while not reader.at_end:
        volumes.append(reader.next_volume())
    return tuple(volumes)


class ShardReader:
    """Reads member after member up to byte `end`. `position` may be set, to go on behind a damage."""

    def __init__(self, file: ShardFile, end: int) -> None:
        self._file, self._end, self.position = file, end, 0
        self._seen: set[str] = set()

    @property
    def at_end(self) -> bool:
        return self.position == self._end

    def read_head(self) -> None:
        """The first member: refuses an unknown format or version."""
        start, length = self._member(HEAD_NAME, MAX_HEAD_BYTES)
        head = parse_json_object(read_bytes(self._file, start, start + length), f"{self._file.name}: {HEAD_NAME}")
        expect(head, "format", FORMAT, self._file.name)
        expect(head, "version", FORMAT_VERSION, self._file.name)

    def next_volume(self) -> ShardEntry:
        """The two members of the volume that begins here."""
        offset = self.position
        key = self._next_key()
        start, length = self._member(key + META_SUFFIX, MAX_META_BYTES)
        data = read_bytes(self._file, start, start + length)
        meta = parse_meta(data, key, self._file.name)
        body_offset, body_bytes = self._member(key + BODY_SUFFIX, MAX_MEMBER_BYTES)
        try:
            frames, table = read_seek_table(self._file, body_offset, body_bytes, meta.shape)
        except ShardError as error:
            raise error.at(file=self._file.name, volume=key) from None
        return ShardEntry(
            meta=meta,
            offset=offset,
            body_offset=body_offset,
            frames=frames,
            meta_bytes=length,
            meta_sha256=hashlib.sha256(data).hexdigest(),
            seek_table_sha256=hashlib.sha256(table).hexdigest(),
        )

    def _next_key(self) -> str:
        """The KEY of the member that comes next; its header is checked by _member."""
        name = self._header()[:100].rstrip(b"\0")
        try:
            key = name.decode("ascii").removesuffix(META_SUFFIX)
        except UnicodeDecodeError:
            key = ""
        if not ID_PATTERN.fullmatch(key) or not name.endswith(META_SUFFIX.encode()) or key in self._seen:
            raise ShardError(
                f"byte {self.position}: {name[:100]!r} is not the first member of a new volume", file=self._file.name
            )
        self._seen.add(key)
        return key

    def _header(self) -> bytes:
        if self.position + BLOCK > self._end:
            raise ShardError(f"ends at byte {self.position} where a member should begin", file=self._file.name)
        return read_bytes(self._file, self.position, self.position + BLOCK)

    def _member(self, name: str, limit: int) -> tuple[int, int]:
        """Offset and size of the data of the member here, which must have this name; moves behind it."""
        header, start = self._header(), self.position + BLOCK
        digits = header[124:135]
        size = int(digits, 8) if re.fullmatch(rb"[0-7]{11}", digits) else -1
        if size < 0 or header != member_header(name, size):
            raise ShardError(f"byte {self.position}: not the tar header of {name}", file=self._file.name)
        if size > limit or start + _padded(size) > self._end:
            raise ShardError(
                f"byte {self.position}: {name} claims {size} bytes, beyond the shard", file=self._file.name
            )
        self.position = start + _padded(size)
        if any(read_bytes(self._file, start + size, self.position)):
            raise ShardError(f"the padding after {name} is not empty", file=self._file.name)
        return start, size
