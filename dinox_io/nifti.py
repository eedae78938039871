"""NIfTI files (.nii, .nii.gz) as series of one volume: recognised, named, and read back into DICOM's axes.

Invariant: a file is untrusted: its sizes are checked before anything is allocated or inflated, and no more is inflated
than its header declares. What dcm2niix made of a standard axial series gives that series' voxels, bit for bit. The
format has no modality and names no patient: the first is judged by the values, the second by the path.
Formats: NIfTI-1 (nifti1.h) and NIfTI-2 (nifti2.h); nibabel reads the header's fields.
"""

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from dinox_io import geometry
from dinox_io.archive import ArchiveError, open_binary
from dinox_io.dicom import EDGE_MAX, FRAMES_MAX, SURPLUS_BYTES_MAX
from dinox_io.geometry import Plane
from dinox_io.hounsfield import HU_MAX, HU_MIN, to_hounsfield
from dinox_io.image import Identity
from dinox_io.nifti_patient import patient_by_path, series_name
from dinox_io.rules import Refused, verdict
from dinox_io.series import VOLUME_BYTES_MAX, SeriesRules
from dinox_io.volume import Rejection, Volume

LOWEST_HU_MAX = -50
"""A CT has fat, air or noise below this; masks, magnitudes of MR, counts of PET and normalised values have not."""
_OFFSET_BYTES_MAX = 16 << 20
"""Header extensions before the voxels."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Layout:
    """Where the voxels lie: all dimensions of the header, bits of a value, byte offset."""

    version: Literal[1, 2]
    dimensions: tuple[int, ...]
    bits: int
    offset: int

    @property
    def data_bytes(self) -> int:
        return math.prod(self.dimensions) * self.bits // 8

    def check(self) -> tuple[int, int, int]:
        """(x, y, z) voxels of the one volume; Refused if there are more, or sizes that no CT has."""
        begins = 352 if self.version == 1 else 540
        if len(self.dimensions) < 2 or min(self.dimensions) < 1 or not begins <= self.offset <= _OFFSET_BYTES_MAX:
            raise Refused("NIFTI_DAMAGED")
        x, y, z = (*self.dimensions, 1)[:3]
        others = math.prod(self.dimensions[3:])
        if others > 1:
            raise Refused("NIFTI_VOLUMES", count=others)
        if max(x, y) > EDGE_MAX or z > FRAMES_MAX or 2 * x * y * z > VOLUME_BYTES_MAX:
            raise Refused("SIZE_REFUSED", rows=y, columns=x, frames=z)
        return x, y, z


def _layout(head: bytes) -> _Layout | None:
    """The layout that a single-file header gives; None if these bytes are none."""
    for order in ("<", ">"):
        size = int(np.frombuffer(head[:4].ljust(4, b"\0"), f"{order}i4")[0])
        if size == 348 and head[344:348] == b"n+1\0":
            dimensions, (bits,) = np.frombuffer(head, f"{order}i2", 8, 40), np.frombuffer(head, f"{order}i2", 1, 72)
            start = float(np.frombuffer(head, f"{order}f4", 1, 108)[0])
            version, offset = 1, int(start) if math.isfinite(start) else -1
        elif size == 540 and head[4:12] == b"n+2\0\r\n\x1a\n" and len(head) >= 540:
            dimensions, (bits,) = np.frombuffer(head, f"{order}i8", 8, 16), np.frombuffer(head, f"{order}i2", 1, 14)
            version, offset = 2, int(np.frombuffer(head, f"{order}i8", 1, 168)[0])
        else:
            continue
        count = int(dimensions[0])
        return _Layout(version, tuple(map(int, dimensions[1 : count + 1])) if 0 < count < 8 else (), int(bits), offset)
    return None


# ---------------------------------------------------------------------------------------------- finding


def recognise(head: bytes) -> str | None:
    """What the first bytes of a file are: "nifti", the code of what is not read, or None for anything else."""
    if head[:2] == b"\x1f\x8b":
        head = _inflated_head(head)
        if head[128:132] == b"DICM" or head[257:262] == b"ustar" or head[:4] == b"PK\x03\x04":
            return "ARCHIVE_UNSUPPORTED"
    sized = head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c")
    if (sized and head[344:348] == b"ni1\0") or head[4:8] == b"ni2\0":
        return "NIFTI_PAIR"
    return "nifti" if _layout(head) else None


def _inflated_head(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, 1024)
    except zlib.error:
        return b""


def identify(file: BinaryIO, head: bytes, path: str, top: str) -> Identity:
    """A NIfTI file as a series of its own, named by its (inflated) bytes and its patient; the patient by its path.

    OSError if it cannot be read.
    """
    file.seek(0)
    layout = _layout(head if head[:2] != b"\x1f\x8b" else _inflated_head(head))
    limit = _CHUNK_BYTES
    try:
        if layout is not None and layout.check():
            limit = layout.offset + layout.data_bytes + SURPLUS_BYTES_MAX
    except Refused:
        pass  # refused when it is read; until then it needs some name
    patient, patient_from = patient_by_path(path, top)
    return Identity(
        patient_id=patient,
        issuer="",
        study_uid="",
        series_uid=series_name(_content_digest(file, head, limit), patient),
        format="nifti",
        patient_from=patient_from,
    )


def _content_digest(file: BinaryIO, head: bytes, limit: int) -> str:
    digest = hashlib.sha256()
    stream = _inflating(file, head)
    try:
        while limit > 0 and (chunk := stream.read(min(limit, _CHUNK_BYTES))):
            digest.update(chunk)
            limit -= len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pass  # damaged behind here: refused when it is read
    return digest.hexdigest()


def _inflating(file: BinaryIO, head: bytes) -> BinaryIO:
    return gzip.GzipFile(fileobj=file, mode="rb") if head[:2] == b"\x1f\x8b" else file  # pyright: ignore[reportReturnType]


# ---------------------------------------------------------------------------------------------- reading


def read_nifti(
    paths: Sequence[Path], *, series: str, patient: str, rules: SeriesRules
) -> tuple[list[Volume], list[Rejection]]:
    """The volume of a NIfTI file, and the rows of the report; `paths`: the file and its copies (pseudonyms given).

    OSError if it cannot be read.
    """
    try:
        volume = _read(paths[0], series, patient, rules, len(paths) - 1)
    except Refused as refusal:
        return [], [verdict(refusal.code, series=series, files=len(paths), **refusal.figures)]
    except ArchiveError as error:
        return [], [verdict(error.code, series=series, files=len(paths))]
    copies = len(paths) - 1
    return [volume], [verdict("DUPLICATE_DROPPED", series=series, files=copies)] if copies else []


@contextmanager
def _reading() -> Iterator[None]:
    """Damage of the compressed stream as a refusal."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise Refused("PIXELS_DAMAGED", place="the file", syntax="gzip") from None


def _read(path: Path, series: str, patient: str, rules: SeriesRules, copies: int) -> Volume:
    with open_binary(path, whole=True) as file, _reading():
        magic = file.read(2)
        file.seek(0)
        stream = _inflating(file, magic)
        head = stream.read(540)
        layout = _layout(head)
        if layout is None:
            raise Refused("NIFTI_DAMAGED")
        shape = layout.check()
        header = _Header(head, layout)
        placed = _placed(header.affine_lps_mm, shape, rules)
        slope, intercept = header.scale(shape[2])
        stream.seek(layout.offset)
        voxels = _Voxels(stream, header.data_type, shape, slope, intercept)
        hu = voxels.decode(placed.flipped)
        surplus_bytes = len(stream.read(SURPLUS_BYTES_MAX + 1))  # reaches the checksum of gzip too
    if surplus_bytes > SURPLUS_BYTES_MAX:
        found = layout.data_bytes + surplus_bytes
        raise Refused("PIXELS_TOO_LONG", place="the file", found=found, expected=layout.data_bytes)
    if hu.min() > LOWEST_HU_MAX:
        raise Refused("NOT_HU")
    facts: dict[str, Any] = dict.fromkeys(("manufacturer", "kernel", "kvp", "thickness_mm", "patient_position"))
    facts |= {
        "source": "nifti",
        "affine_from": header.affine_from,
        "rescale": [slope, intercept],
        "padding_stored": None,
        "tilt_degrees": round(placed.tilt_degrees, 3),
        "burned_in": "unknown",
        "lossy": None,
        "dropped": {"duplicate": copies} if copies else {},
        "saturated_voxels": voxels.saturated,
        "rounded": voxels.rounded,
        "surplus_bytes": surplus_bytes,
    }
    return Volume(
        id=series,
        series=series,
        patient=patient,
        hu=hu,
        spacing_mm=placed.spacing_mm,
        z_positions_mm=placed.z_mm,
        orientation=placed.directions.cosines,
        facts=facts,
    )


class _Header:
    """What nibabel makes of the header's fields."""

    def __init__(self, head: bytes, layout: _Layout) -> None:
        try:
            from nibabel.nifti1 import Nifti1Header
            from nibabel.nifti2 import Nifti2Header
        except ImportError:
            raise Refused("NIFTI_READER_MISSING") from None
        kind = Nifti1Header if layout.version == 1 else Nifti2Header
        try:
            self._fields = kind.from_fileobj(io.BytesIO(head[: 348 if layout.version == 1 else 540]), check=False)
        except Exception:  # whatever a parser says to rubbish
            raise Refused("NIFTI_DAMAGED") from None
        if int(self._fields["xyzt_units"]) & 7 not in (0, 2):
            raise Refused("NIFTI_UNITS")
        self.data_type = self._data_type(layout.bits)
        self.affine_from, affine = self._affine(layout.dimensions)
        # NIfTI's axes point to right, anterior, superior; DICOM's to left, posterior, superior.
        self.affine_lps_mm = affine * np.array([[-1.0], [-1.0], [1.0], [1.0]])

    def _data_type(self, bits: int) -> np.dtype:
        try:
            found = self._fields.get_data_dtype()
        except Exception:
            found = np.dtype("V1")
        if (found.kind, found.itemsize) not in {(kind, size) for kind in "iu" for size in (1, 2, 4)} | {
            ("f", 4),
            ("f", 8),
        }:
            raise Refused("NIFTI_TYPE", number=int(self._fields["datatype"]))
        if found.itemsize * 8 != bits:
            raise Refused("NIFTI_DAMAGED")
        return found

    def _affine(self, dimensions: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """The sform if there is one, else the qform (nifti1.h, methods 3 and 2)."""
        try:
            if int(self._fields["sform_code"]) > 0:
                return "sform", np.asarray(self._fields.get_sform(), np.float64)
            if int(self._fields["qform_code"]) > 0:
                return "qform", np.asarray(self._fields.get_qform(), np.float64)
        except Exception:
            raise Refused("NIFTI_DAMAGED") from None
        raise Refused("NO_POSITION", count=(*dimensions, 1)[2])

    def scale(self, slices: int) -> tuple[float, float]:
        """(slope, intercept); a slope of 0 or NaN means that there is none (nifti1.h)."""
        slope, intercept = _decimal(self._fields["scl_slope"]), _decimal(self._fields["scl_inter"])
        if slope == 0 or math.isnan(slope):
            return 1.0, 0.0
        if not abs(slope) <= 1e4 or not abs(intercept) <= 1e6:
            raise Refused("NO_RESCALE", count=slices)
        return slope, intercept


def _decimal(value: Any) -> float:
    """The shortest decimal that a number of 32 bits stands for: 0.1, where the header can hold 0.10000000149 only.

    DICOM's rescale is a decimal text; with the header's own number, values that end in .5 would round another way.
    """
    wide = float(value)
    with np.errstate(over="ignore"):
        narrow = np.float32(wide)
    return float(str(narrow)) if float(narrow) == wide else wide


@dataclass(frozen=True)
class _Placed:
    """How the stored axes lie in the patient. `flipped`: x, y, z run against DICOM's."""

    flipped: tuple[bool, bool, bool]
    directions: Plane
    spacing_mm: tuple[float, float, float]
    z_mm: tuple[float, ...]
    tilt_degrees: float


def _placed(affine_mm: np.ndarray, shape: tuple[int, int, int], rules: SeriesRules) -> _Placed:
    """Axes from the affine (4, 4): voxel to patient, in mm; Refused by the same rules as DICOM's geometry."""
    slices = shape[2]
    columns, origin = affine_mm[:3, :3].T, affine_mm[:3, 3]
    lengths = [float(np.linalg.norm(column)) for column in columns]
    if not np.isfinite(affine_mm).all() or not all(0 < length <= 100 for length in lengths):
        raise Refused("NO_PIXEL_SPACING", count=slices)
    if np.abs(origin).max() > 1e5:
        raise Refused("NO_POSITION", count=slices)
    flipped = [bool(column[np.abs(column).argmax()] < 0) for column in columns[:2]]
    along = [
        column / length * (-1 if flip else 1) for column, length, flip in zip(columns, lengths, flipped, strict=False)
    ]
    try:
        directions = geometry.plane([*map(float, along[0]), *map(float, along[1])])
    except ValueError:
        raise Refused("BAD_ORIENTATION") from None
    degrees = geometry.obliquity_degrees(directions)
    if degrees > geometry.AXIAL_LIMIT_DEGREES:
        raise Refused("NOT_AXIAL", degrees=degrees)
    rise = float(columns[2] @ np.array(directions.normal))
    if abs(rise) < 1e-3:
        raise Refused("BAD_ORIENTATION")
    step = columns[2] * math.copysign(1, rise)
    first = origin + (columns[2] * (slices - 1) if rise < 0 else 0)
    tilt = geometry.tilt_degrees([(0.0, 0.0, 0.0), (float(step[0]), float(step[1]), float(step[2]))], directions)
    if tilt > geometry.TILT_LIMIT_DEGREES and not rules.allow_tilt:
        raise Refused("GANTRY_TILT", degrees=tilt)
    if slices < rules.min_slices:
        raise Refused("TOO_FEW_SLICES", count=slices, minimum=rules.min_slices)
    # The header's numbers are of 32 bits: rounded to what these hold, they are the decimals that the source had.
    bottom = geometry.height_mm(list(map(float, first)), directions)
    return _Placed(
        flipped=(flipped[0], flipped[1], rise < 0),
        directions=directions,
        spacing_mm=(round(abs(rise), 6), round(lengths[1], 6), round(lengths[0], 6)),
        z_mm=tuple(round(bottom + z * abs(rise), 4) + 0.0 for z in range(slices)),
        tilt_degrees=tilt,
    )


class _Voxels:
    """The stored values, x fastest, slice by slice into HU."""

    def __init__(
        self, stream: BinaryIO, data_type: np.dtype, shape: tuple[int, int, int], slope: float, intercept: float
    ) -> None:
        self._stream, self._type, self._shape = stream, data_type, shape
        self._slope, self._intercept = slope, intercept
        self.saturated = 0
        self.rounded = False

    def decode(self, flipped: tuple[bool, bool, bool]) -> np.ndarray:
        """int16 HU (z, y, x), C-contiguous, with the flipped axes turned.

        Raises:
            Refused: PIXELS_TRUNCATED, VALUES_NOT_FINITE.
        """
        columns, rows, slices = self._shape
        steps = [-1 if flip else 1 for flip in flipped]
        hu = np.empty((slices, rows, columns), np.int16)
        slice_bytes = rows * columns * self._type.itemsize
        not_finite = 0
        for k in range(slices):
            raw = self._stream.read(slice_bytes)
            if len(raw) != slice_bytes:
                found, expected = k * slice_bytes + len(raw), slices * slice_bytes
                raise Refused("PIXELS_TRUNCATED", place="the file", found=found, expected=expected)
            stored = np.frombuffer(raw, self._type).reshape(rows, columns)
            if self._type.kind == "f" and not np.isfinite(stored).all():
                not_finite += int(np.count_nonzero(~np.isfinite(stored)))
                continue
            z = slices - 1 - k if flipped[2] else k
            hu[z] = self._hounsfield(stored)[:: steps[1], :: steps[0]]
        if not_finite:
            raise Refused("VALUES_NOT_FINITE", count=not_finite)
        return hu

    def _hounsfield(self, stored: np.ndarray) -> np.ndarray:
        if self._type.kind == "f":
            return self._of_real(stored)
        hu, saturated, rounded = to_hounsfield(stored, self._slope, self._intercept)
        self.saturated += saturated
        self.rounded |= rounded
        return hu

    def _of_real(self, stored: np.ndarray) -> np.ndarray:
        exact = stored.astype(np.float64) * self._slope + self._intercept
        whole = np.rint(exact)
        self.rounded |= bool(np.abs(exact - whole).max() > 1e-6)
        self.saturated += int(np.count_nonzero((whole < HU_MIN) | (whole > HU_MAX)))
        return np.clip(whole, HU_MIN, HU_MAX).astype(np.int16)
