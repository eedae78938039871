"""CT slices stored as 16-bit gray PNG (the layout of DINO-X) -> their volumes, or the reason why there are none.

Invariant: how HU were encoded is told, never guessed, and a series that cannot have been written so is refused. A file
is a slice only if it is a whole PNG: every chunk with its checksum, 16 bits, gray, no larger than a CT slice can be.
What PNG does not hold (positions, orientation) is assumed, and recorded as assumed.

The encoder clipped HU to -1000 .. 4000, then stored rint(HU) + 32768 ("x1") or, in later versions, rint(10 HU) + 32768
("x10"), which saturates at 65535 = 3276.7 HU. Its index table describes both with the same words.
PNG: W3C recommendation, 3rd edition, sections 5 (chunks) and 11 (IHDR).
"""

import io
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.rules import Refused, verdict
from dinox_io.series import VOLUME_BYTES_MAX, SeriesRules
from dinox_io.volume import Rejection, Volume

Spacing = tuple[float, float, float]
"""(z, y, x) in mm."""

EDGE_MAX = 4096
"""Rows or columns, as for DICOM."""
SPACING_MAX_MM = 100.0
_AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_BYTES = 8 + 8 + 13 + 4
_ZERO_HU = 32768
_SATURATED = 65535
_SAME_SPACING = 1e-3


@dataclass(frozen=True)
class Encoding:
    """How HU became stored values (uint16): rint(steps_per_hu * HU) + 32768, with HU clipped to `clipped_hu`."""

    name: str
    steps_per_hu: int
    clipped_hu: tuple[float, float]

    @property
    def stored_range(self) -> tuple[int, int]:
        """The least and the largest stored value that it can have written."""
        low, high = (round(hu * self.steps_per_hu) + _ZERO_HU for hu in self.clipped_hu)
        return low, high

    def hu_of(self, stored: float) -> float:
        """HU that a stored value stands for, not rounded."""
        return (stored - _ZERO_HU) / self.steps_per_hu

    def refuted_by(self, low: int, high: int) -> bool:
        """Whether pictures whose stored values go from `low` to `high` cannot have been written so.

        A body lies in air (-1000 HU). Where all values are those that "x1" writes, "x10" would have neither air nor
        bone in it (-100 to 400 HU).
        """
        least, largest = self.stored_range
        if low < least or high > largest:
            return True
        least, largest = ENCODINGS["x1"].stored_range
        return self.steps_per_hu > 1 and least <= low and high <= largest

    def decode(self, stored: np.ndarray) -> tuple[np.ndarray, bool]:
        """uint16 of any shape -> (int16 HU, rounded to the nearest, ties to even; whether any had to be rounded)."""
        offset = stored.astype(np.int32) - _ZERO_HU
        if self.steps_per_hu == 1:
            return offset.astype(np.int16), False
        rounded = bool(np.any((offset % self.steps_per_hu != 0) & (stored != _SATURATED)))
        return np.rint(offset / self.steps_per_hu).astype(np.int16), rounded


ENCODINGS = {
    encoding.name: encoding
    for encoding in (Encoding("x1", 1, (-1000.0, 4000.0)), Encoding("x10", 10, (-1000.0, 3276.7)))
}


def other_encoding(name: str) -> str:
    """The name of the other one."""
    return next(other for other in ENCODINGS if other != name)


# ---------------------------------------------------------------------------------------------- one picture


def read_size(path: Path) -> tuple[int, int]:
    """(rows, columns) of a 16-bit gray PNG, by its first 33 bytes.

    Raises:
        Refused: PNG_DAMAGED, PNG_NOT_GRAY16 or SIZE_REFUSED.
        OSError: it is no regular file, or cannot be read.
    """
    _check_regular(path)
    with path.open("rb") as stream:
        return _size(stream.read(_HEADER_BYTES))


def read_stored(path: Path) -> np.ndarray:
    """Stored values of a 16-bit gray PNG: uint16 (rows, columns). Raises as `read_size`."""
    rows, columns = read_size(path)
    # Deflate never makes noise more than slightly larger; what is beyond is no picture.
    limit = 4 * rows * columns + (1 << 20)
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise Refused("PNG_DAMAGED")
    return _pixels(_only_image(data), rows, columns)


def stored_range(path: str) -> tuple[int, int] | None:
    """Least and largest stored value of a picture, or None if it cannot be read. Runs in a worker."""
    try:
        stored = read_stored(Path(path))
    except (OSError, Refused):
        return None
    return int(stored.min()), int(stored.max())


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no regular file")  # opening a pipe would wait for ever


def _size(header: bytes) -> tuple[int, int]:
    if len(header) < _HEADER_BYTES or header[:8] != _SIGNATURE or header[8:16] != b"\0\0\0\x0dIHDR":
        raise Refused("PNG_DAMAGED")
    if zlib.crc32(header[12:29]) != int.from_bytes(header[29:33], "big"):
        raise Refused("PNG_DAMAGED")
    columns, rows, bits, colour = struct.unpack(">IIBB", header[16:26])
    if (bits, colour) != (16, 0):
        raise Refused("PNG_NOT_GRAY16", bits=bits, colour=colour)
    if not (0 < rows <= EDGE_MAX and 0 < columns <= EDGE_MAX):
        raise Refused("SIZE_REFUSED", rows=rows, columns=columns, frames=1)
    return rows, columns


def _only_image(data: bytes) -> bytes:
    """The PNG with nothing in it but IHDR, IDAT and IEND, all of whose chunks are whole. Raises Refused.

    The decoder checks no checksum of pixels; and a gamma, a palette or a text may not touch what is read.
    """
    kept, position, names = [data[:8]], 8, []
    while position < len(data) and names[-1:] != [b"IEND"]:
        length = int.from_bytes(data[position : position + 4], "big")
        chunk = data[position : position + 12 + length]
        if len(chunk) < 12 + length or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise Refused("PNG_DAMAGED")
        names.append(chunk[4:8])
        if names[-1] in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(chunk)
        elif not names[-1][0] & 0x20:  # a critical chunk that is not gray pixels
            raise Refused("PNG_DAMAGED")
        position += len(chunk)
    if names[-1:] != [b"IEND"] or names.count(b"IHDR") != 1:
        raise Refused("PNG_DAMAGED")
    return b"".join(kept)


def _pixels(data: bytes, rows: int, columns: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            stored = np.asarray(image)
    # The decoder's own errors are of many types; none of them may end more than this picture.
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        raise Refused("PNG_DAMAGED") from None
    if stored.shape != (rows, columns) or stored.dtype.kind not in "ui" or stored.dtype.itemsize < 2:
        raise Refused("PNG_DAMAGED")
    return stored.astype(np.uint16)


# ---------------------------------------------------------------------------------------------- a series


def read_png16(
    paths: Sequence[Path], *, series: str, patient: str, rules: SeriesRules, encoding: str, indices: Sequence[int],
    spacings_mm: Sequence[Spacing], spacing_from: str, unspaced: int, conflicts: int,
) -> tuple[list[Volume], list[Rejection]]:  # fmt: skip
    """Volumes of one series (pseudonyms given), and the rows that reading it adds to the report; as `read_series`.

    Args:
        paths: the pictures of the series.
        encoding: "x1" or "x10".
        indices: the slice number of each picture, ascending with z.
        spacings_mm: the distinct spacings that the index table gives its slices.
        spacing_from: where they come from: "index" or "given".
        unspaced: for how many slices there is none.
        conflicts: how many of the pictures the table lists under another number or series too.
    """
    try:
        if conflicts:
            raise Refused("INDEX_CONFLICT", count=conflicts)
        spacing = _one_spacing(spacings_mm, unspaced)
        return _Pictures(paths, indices, series, patient, rules, ENCODINGS[encoding], spacing, spacing_from).read()
    except Refused as refusal:
        return [], [verdict(refusal.code, series=series, files=len(paths), **refusal.figures)]


def _one_spacing(spacings_mm: Sequence[Spacing], unspaced: int) -> Spacing:
    if unspaced:
        raise Refused("NO_PIXEL_SPACING", count=unspaced)
    for axis in range(3):
        values = [spacing[axis] for spacing in spacings_mm]
        if max(values) - min(values) > _SAME_SPACING * min(values):
            raise Refused("MIXED_SPACING")
    return min(spacings_mm)


class _Pictures:
    """The pictures of one series, on their way to volumes."""

    def __init__(
        self, paths: Sequence[Path], indices: Sequence[int], series: str, patient: str, rules: SeriesRules,
        encoding: Encoding, spacing: Spacing, spacing_from: str,
    ) -> None:  # fmt: skip
        self.paths, self.series, self.patient, self.rules = paths, series, patient, rules
        self.encoding, self.spacing, self.spacing_from = encoding, spacing, spacing_from
        self.indices = indices
        self.at: dict[int, list[int]] = {}
        """Slice number -> which of the paths; several only if the table has copies."""
        for number, index in sorted(enumerate(indices), key=lambda pair: pair[1]):
            self.at.setdefault(index, []).append(number)
        self.notes: list[Rejection] = []
        self.rounded: dict[int, bool] = {}
        self.low, self.high = 65535, 0

    def read(self) -> tuple[list[Volume], list[Rejection]]:
        matrix = self._matrix()
        runs = self._runs(sorted(self.at))
        volumes = [self._volume(number, run, len(runs), matrix) for number, run in enumerate(runs)]
        if self.encoding.refuted_by(self.low, self.high):
            raise self._wrong_encoding()
        copies = len(self.paths) - len(self.at)
        if copies:
            self.notes.append(verdict("DUPLICATE_DROPPED", series=self.series, files=copies))
        return volumes, self.notes

    def _matrix(self) -> tuple[int, int]:
        sizes = Counter(self._of(number, read_size) for index in sorted(self.at) for number in self.at[index])
        rows, columns = min(sizes, key=lambda size: (-sizes[size], size))
        if len(sizes) > 1:
            raise Refused("MIXED_MATRIX", count=len(sizes), rows=rows, columns=columns)
        if 2 * len(self.at) * rows * columns > VOLUME_BYTES_MAX:
            raise Refused("SIZE_REFUSED", rows=rows, columns=columns, frames=len(self.at))
        return rows, columns

    def _of(self, number: int, read: Any) -> Any:
        """What `read` makes of a picture; a refusal says which one it was."""
        try:
            return read(self.paths[number])
        except Refused as refusal:
            raise Refused(refusal.code, **{"place": f"slice {self.indices[number]}", **refusal.figures}) from None

    def _runs(self, indices: list[int]) -> list[list[int]]:
        """The slice numbers that become volumes: all, or with `split_gaps` the runs without a missing one."""
        minimum, z_mm = self.rules.min_slices, self.spacing[0]
        gaps = [(before, after) for before, after in pairwise(indices) if after != before + 1]
        if len(indices) < minimum:
            raise Refused("TOO_FEW_SLICES", count=len(indices), minimum=minimum)
        if not gaps:
            return [indices]
        if not self.rules.split_gaps:
            before, after = gaps[0]
            step_mm = (after - before) * z_mm
            raise Refused("SLICE_GAP", count=len(gaps), z_mm=before * z_mm, step_mm=step_mm, usual_mm=z_mm)
        starts = [0, *(indices.index(after) for _, after in gaps), len(indices)]
        runs = [indices[start:stop] for start, stop in pairwise(starts) if stop - start >= minimum]
        if not runs:
            raise Refused("TOO_FEW_SLICES", count=0, minimum=minimum)
        left = len(indices) - sum(map(len, runs))
        note = verdict("SPLIT_AT_GAPS", series=self.series, files=left, count=len(runs), dropped=left, minimum=minimum)
        self.notes.append(note)
        return runs

    def _volume(self, number: int, run: list[int], runs: int, matrix: tuple[int, int]) -> Volume:
        hu = np.empty((len(run), *matrix), np.int16)
        for z, index in enumerate(run):
            hu[z] = self._slice_hu(index)
        split = len(run) != len(self.at)
        facts: dict[str, Any] = {
            "source": "png16",
            "stored_as": self.encoding.name,
            "clipped_hu": list(self.encoding.clipped_hu),
            "geometry": "assumed",
            "spacing_from": self.spacing_from,
            "dropped": {"duplicate": copies} if (copies := len(self.paths) - len(self.at)) else {},
            "rounded": any(self.rounded[index] for index in run),
        }
        if split:
            facts["split_at_gaps"] = {"run": number + 1, "runs": runs}
        return Volume(
            id=f"{self.series}-{number + 1}" if split else self.series,
            series=self.series,
            patient=self.patient,
            hu=hu,
            spacing_mm=self.spacing,
            z_positions_mm=tuple(round(index * self.spacing[0], 6) for index in run),
            orientation=_AXIAL,
            facts=facts,
        )

    def _slice_hu(self, index: int) -> np.ndarray:
        """HU of the slice with this number; its copies must be equal."""
        first, *copies = self.at[index]
        stored = self._stored(first)
        if any(not np.array_equal(stored, self._stored(copy)) for copy in copies):
            raise Refused("DUPLICATE_POSITION", count=1, z_mm=index * self.spacing[0])
        hu, self.rounded[index] = self.encoding.decode(stored)
        return hu

    def _stored(self, number: int) -> np.ndarray:
        stored = self._of(number, read_stored)
        self.low, self.high = min(self.low, int(stored.min())), max(self.high, int(stored.max()))
        return stored

    def _wrong_encoding(self) -> Refused:
        low, high = self.encoding.hu_of(self.low), self.encoding.hu_of(self.high)
        name = self.encoding.name
        return Refused("WRONG_ENCODING", encoding=name, low_hu=low, high_hu=high)
