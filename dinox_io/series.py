"""The files of one series -> its volumes, or the reason why there is none: DESIGN's decisions, in order.

Invariant: what comes out is complete, ordered and in HU, and whatever was left out, rounded or saturated stands in the
volume's facts or in a `Rejection`; nothing depends on the order or the names of the files. Slices are decoded singly.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io import dicom, geometry, image_kind, privacy, stacking
from dinox_io.archive import ArchiveError
from dinox_io.fileformat import NotDicom
from dinox_io.geometry import Plane
from dinox_io.hounsfield import to_hounsfield
from dinox_io.image import CT_IMAGES, Slice
from dinox_io.pixels import PixelReader
from dinox_io.rules import RULES, Refused, verdict
from dinox_io.volume import Rejection, Volume

VOLUME_BYTES_MAX = 4 << 30
"""Largest volume that is read (int16): 8192 slices of 512 x 512."""
_POSITION_MAX_MM = 1e5


@dataclass(frozen=True, kw_only=True)
class SeriesRules:
    """What the user decides about debatable series; the defaults refuse."""

    min_slices: int = 3
    split_gaps: bool = False
    allow_tilt: bool = False
    allow_burned_in: bool = False


def read_series(
    paths: Sequence[Path], *, series: str, patient: str, rules: SeriesRules
) -> tuple[list[Volume], list[Rejection]]:
    """Volumes of the files of one series (pseudonyms given), and the rows that its reading adds to the report.

    No volume and a row that says why; one volume; or several (`split_gaps`), ascending. Raises OSError if a file cannot
    be read.
    """
    try:
        return _Reader(paths, series, patient, rules).read()
    except Refused as refusal:
        return [], [verdict(refusal.code, series=series, files=len(paths), **refusal.figures)]
    except ArchiveError as error:
        return [], [verdict(error.code, series=series, files=len(paths))]


class _Reader:
    """The steps of one series; each step narrows `self.slices` or raises Refused."""

    def __init__(self, paths: Sequence[Path], series: str, patient: str, rules: SeriesRules) -> None:
        self.paths = paths
        self.series = series
        self.patient = patient
        self.rules = rules
        self.notes: list[Rejection] = []
        self.dropped: Counter[str] = Counter()
        self.saturated: dict[int, int] = {}
        self.rounded: set[int] = set()
        self.surplus_bytes = 0

    def read(self) -> tuple[list[Volume], list[Rejection]]:
        slices = self._only_ct(self._headers())
        _check_complete(slices)
        self._check_burned_in(slices)
        directions = self.directions = _common_plane(slices)
        ordered = _ordered(slices, directions)
        self._check_tilt(ordered, directions)
        hu, ordered = self._decode(ordered, directions)
        stacking.check_interleaved([piece.origin[0] for piece in ordered], [piece.kernel for piece in ordered])
        heights = [geometry.height_mm(_position(piece), directions) for piece in ordered]
        runs = self._runs(heights)
        for run in runs:
            _check_alternating(ordered[run.start : run.stop])
        volumes = [
            self._volume(index, run, len(runs), hu, ordered, heights, directions) for index, run in enumerate(runs)
        ]
        return volumes, self.notes

    # ------------------------------------------------------------------ which files

    def _headers(self) -> list[Slice]:
        slices: list[Slice] = []
        damaged = 0
        for path in self.paths:
            try:
                found = dicom.read_slices(path)
            except NotDicom:
                damaged += 1
                continue
            # A CT image without pixels was cut in its header.
            damaged += found[0].file.pixel_offset is None and found[0].file.sop_class in CT_IMAGES
            slices += found
        if damaged:
            raise Refused("FILES_DAMAGED", count=damaged)
        return slices

    def _only_ct(self, slices: list[Slice]) -> list[Slice]:
        kinds = [image_kind.other_kind(piece) for piece in slices]
        wanted = [piece for piece, kind in zip(slices, kinds, strict=True) if kind is None]
        others = Counter(kind for kind in kinds if kind is not None)
        if not wanted:
            raise Refused(min(others, key=lambda kind: list(RULES).index(kind)))
        localizers = others.pop("LOCALIZER", 0)
        if others:
            raise Refused("MIXED_SERIES", count=others.total())
        if localizers:
            self.dropped["localizer"] = localizers
            self.notes.append(verdict("LOCALIZER_DROPPED", series=self.series, files=localizers))
        return wanted

    def _check_burned_in(self, slices: list[Slice]) -> None:
        if not self.rules.allow_burned_in and any(piece.file.burned_in == "YES" for piece in slices):
            raise Refused("BURNED_IN_ANNOTATION")

    # ------------------------------------------------------------------ geometry

    def _check_tilt(self, ordered: list[Slice], directions: Plane) -> None:
        degrees = _tilt(ordered, directions)
        if degrees > geometry.TILT_LIMIT_DEGREES and not self.rules.allow_tilt:
            raise Refused("GANTRY_TILT", degrees=degrees)
        shift = geometry.shift_mm([_position(piece) for piece in ordered], directions)
        if shift > max(spacing for piece in ordered for spacing in piece.pixel_spacing or (0.0,)):
            raise Refused("SHIFTED_SLICES", shift_mm=shift)

    def _runs(self, heights: list[float]) -> list[range]:
        """Stretches of slices that become volumes: all of them, or with `split_gaps` the runs of equal steps."""
        minimum = self.rules.min_slices
        if len(heights) < minimum:
            raise Refused("TOO_FEW_SLICES", count=len(heights), minimum=minimum)
        if geometry.is_regular(heights):
            return [range(len(heights))]
        if not self.rules.split_gaps:
            raise stacking.irregular(heights)
        runs = [run for run in geometry.contiguous_runs(heights) if len(run) >= minimum]
        if not runs:
            raise Refused("TOO_FEW_SLICES", count=0, minimum=minimum)
        left = len(heights) - sum(map(len, runs))
        note = verdict("SPLIT_AT_GAPS", series=self.series, files=left, count=len(runs), dropped=left, minimum=minimum)
        self.notes.append(note)
        return runs

    # ------------------------------------------------------------------ pixels

    def _decode(self, ordered: list[Slice], directions: Plane) -> tuple[np.ndarray, list[Slice]]:
        """HU (z, y, x) of one slice a position, and those slices; copies are compared, then left out."""
        heights = [geometry.height_mm(_position(piece), directions) for piece in ordered]
        groups = geometry.position_groups(heights)
        self._check_before_decoding(groups, heights)
        rows, columns = ordered[0].file.rows, ordered[0].file.columns
        if len(groups) * rows * columns * 2 > VOLUME_BYTES_MAX:
            raise Refused("SIZE_REFUSED", rows=rows, columns=columns, frames=len(groups))
        hu = np.empty((len(groups), rows, columns), np.int16)
        conflicts: list[float] = []
        with PixelReader() as reader:
            for z, group in enumerate(groups):
                hu[z], self.saturated[z], rounded = self._slice_hu(reader, ordered[group[0]])
                if rounded:
                    self.rounded.add(z)
                if any(not self._is_copy(reader, ordered[i], ordered[group[0]], hu[z]) for i in group[1:]):
                    conflicts.append(heights[group[0]])
            self.surplus_bytes = reader.surplus_bytes
        if conflicts:
            raise Refused("DUPLICATE_POSITION", count=len(conflicts), z_mm=conflicts[0])
        copies = len(ordered) - len(groups)
        if copies:
            self.dropped["duplicate"] = copies
            self.notes.append(verdict("DUPLICATE_DROPPED", series=self.series, files=copies))
        return hu, [ordered[group[0]] for group in groups]

    def _check_before_decoding(self, groups: list[list[int]], heights: list[float]) -> None:
        """What positions alone decide, so that a hopeless series costs no decoding."""
        starts = [heights[group[0]] for group in groups]
        if len(starts) < self.rules.min_slices:
            raise Refused("TOO_FEW_SLICES", count=len(starts), minimum=self.rules.min_slices)
        if all(len(group) == 1 for group in groups) and not self.rules.split_gaps and not geometry.is_regular(starts):
            raise stacking.irregular(starts)

    def _is_copy(self, reader: PixelReader, piece: Slice, kept: Slice, kept_hu: np.ndarray) -> bool:
        offset = [abs(a - b) for a, b in zip(_position(piece), _position(kept), strict=True)]
        return max(offset) < geometry.SAME_POSITION_MM and np.array_equal(self._slice_hu(reader, piece)[0], kept_hu)

    def _slice_hu(self, reader: PixelReader, piece: Slice) -> tuple[np.ndarray, int, bool]:
        assert piece.slope is not None
        assert piece.intercept is not None
        try:
            return to_hounsfield(reader.stored(piece), piece.slope, piece.intercept)
        except Refused as refusal:
            # By height, not by a number among the files: names of files must not matter.
            height_mm = geometry.height_mm(_position(piece), self.directions)
            raise Refused(refusal.code, **{"place": f"the slice at {height_mm:.3f} mm", **refusal.figures}) from None

    # ------------------------------------------------------------------ the record

    def _volume(
        self, index: int, run: range, runs: int, hu: np.ndarray, ordered: list[Slice], heights: list[float],
        directions: Plane,
    ) -> Volume:  # fmt: skip
        pieces = ordered[run.start : run.stop]
        z_mm = heights[run.start : run.stop]
        spacing = pieces[0].pixel_spacing
        assert spacing is not None
        facts = series_facts(pieces, directions)
        facts["dropped"] = dict(sorted(self.dropped.items()))
        facts["saturated_voxels"] = sum(self.saturated[z] for z in run)
        facts["rounded"] = any(z in self.rounded for z in run)
        facts["surplus_bytes"] = self.surplus_bytes
        split = len(run) != len(ordered)
        if split:
            facts["split_at_gaps"] = {"run": index + 1, "runs": runs}
        return Volume(
            id=f"{self.series}-{index + 1}" if split else self.series,
            series=self.series,
            patient=self.patient,
            hu=hu[run.start : run.stop],
            spacing_mm=(_z_spacing(pieces[0], z_mm), spacing[0], spacing[1]),
            z_positions_mm=tuple(z_mm),
            orientation=directions.cosines,
            facts=facts,
        )


def _check_alternating(pieces: Sequence[Slice]) -> None:
    stacking.check_alternating(
        *zip(*(piece.origin for piece in pieces), strict=True),
        [piece.kernel for piece in pieces],
        [piece.kvp for piece in pieces],
        [image_kind.reconstruction(piece.image_type) for piece in pieces],
        stacking.levels([piece.thickness for piece in pieces]),
    )


def _check_complete(slices: list[Slice]) -> None:
    """Refuse a series in which a slice lacks what HU or geometry need, or whose slices differ in matrix or spacing."""
    stacks = {piece.stack for piece in slices if any(piece.stack)}
    if len(stacks) > 1:
        raise Refused("MIXED_STACKS", count=len(stacks))
    matrices = Counter((piece.file.rows, piece.file.columns) for piece in slices)
    if len(matrices) > 1:
        rows, columns = min(matrices, key=lambda size: (-matrices[size], size))
        raise Refused("MIXED_MATRIX", count=len(matrices), rows=rows, columns=columns)
    unplaced = sum(not _usable_position(piece) for piece in slices)
    if unplaced:
        raise Refused("NO_POSITION", count=unplaced)
    spacings = [piece.pixel_spacing for piece in slices]
    missing = sum(spacing is None or not all(0 < value <= 100 for value in spacing) for spacing in spacings)
    if missing:
        raise Refused("NO_PIXEL_SPACING", count=missing)
    unscaled = sum(not _usable_rescale(piece) for piece in slices)
    if unscaled:
        raise Refused("NO_RESCALE", count=unscaled)
    for axis in (0, 1):
        values = [spacing[axis] for spacing in spacings if spacing is not None]
        if max(values) - min(values) > 1e-3 * min(values):
            raise Refused("MIXED_SPACING")


def _usable_position(piece: Slice) -> bool:
    position = piece.position
    return piece.orientation is not None and position is not None and max(map(abs, position)) <= _POSITION_MAX_MM


def _usable_rescale(piece: Slice) -> bool:
    slope, intercept = piece.slope, piece.intercept
    return slope is not None and intercept is not None and 0 < abs(slope) <= 1e4 and abs(intercept) <= 1e6


def _common_plane(slices: list[Slice]) -> Plane:
    orientations = [piece.orientation for piece in slices if piece.orientation is not None]
    # The least one, not the first: the result must not depend on the order of the files.
    reference = min(orientations)
    if not all(geometry.same_orientation(orientation, reference) for orientation in orientations):
        raise Refused("MIXED_ORIENTATION")
    try:
        directions = geometry.plane(reference)
    except ValueError:
        raise Refused("BAD_ORIENTATION") from None
    degrees = geometry.obliquity_degrees(directions)
    if degrees > geometry.AXIAL_LIMIT_DEGREES:
        raise Refused("NOT_AXIAL", degrees=degrees)
    return directions


def _position(piece: Slice) -> geometry.Vector:
    assert piece.position is not None
    return piece.position


def _ordered(slices: list[Slice], directions: Plane) -> list[Slice]:
    """Slices by position along the normal; copies of one position by their own facts, never by file name."""

    def key(piece: Slice) -> tuple[float, str, str]:
        facts = replace(piece, file=replace(piece.file, path=""))
        return geometry.height_mm(_position(piece), directions), piece.file.sop_uid, repr(facts)

    return sorted(slices, key=key)


def _tilt(ordered: list[Slice], directions: Plane) -> float:
    """Degrees between normal and stacking direction; of a single position, what GantryDetectorTilt says."""
    first, last = _position(ordered[0]), _position(ordered[-1])
    rise = geometry.height_mm(last, directions) - geometry.height_mm(first, directions)
    if rise < geometry.SAME_POSITION_MM:
        return abs(privacy.number_in_range(ordered[0].tilt, -90, 90) or 0.0)
    return geometry.tilt_degrees([first, last], directions)


def _z_spacing(piece: Slice, z_mm: Sequence[float]) -> float:
    """Mean step; of a single slice SpacingBetweenSlices, else SliceThickness, else 0 (mm)."""
    if len(z_mm) > 1:
        return geometry.step_mm(z_mm)
    return privacy.number_in_range(piece.spacing_between, 1e-3, 100) or _thickness(piece) or 0.0


def _thickness(piece: Slice) -> float | None:
    return privacy.number_in_range(piece.thickness, 1e-3, 100)


def _padding_stored(piece: Slice) -> int | None:
    padding = piece.file.padding
    return padding if privacy.number_in_range(padding, -(2**15), 2**16 - 1) is not None else None


def series_facts(pieces: Sequence[Slice], directions: Plane) -> dict[str, Any]:
    """What of the headers stands in a volume's record, as JSON values: the table of facts in docs/format.md, no more.

    A fact that is equal in all slices stands once, else as a list with one value a slice, z ascending.
    """
    image = pieces[0].file
    withheld: set[str] = set()

    def text(keyword: str, value: str, closed: str | None) -> str | None:
        if value and closed is None:
            withheld.add(keyword)
        return closed

    def per_slice(values: list[Any]) -> Any:
        return values[0] if all(value == values[0] for value in values) else values

    placed = image.patient_position
    facts: dict[str, Any] = {
        "manufacturer": text("Manufacturer", image.manufacturer, privacy.manufacturer(image.manufacturer)),
        "kernel": per_slice([text("ConvolutionKernel", p.kernel, privacy.kernel(p.kernel)) for p in pieces]),
        "kvp": per_slice([privacy.number_in_range(piece.kvp, 1, 1000) for piece in pieces]),
        "thickness_mm": per_slice([_thickness(piece) for piece in pieces]),
        "patient_position": text("PatientPosition", placed, privacy.patient_position(placed)),
        "rescale": per_slice([[piece.slope, piece.intercept] for piece in pieces]),
        "rescale_type": per_slice([image_kind.rescale_unit(piece) for piece in pieces]),
        "padding_stored": per_slice([_padding_stored(piece) for piece in pieces]),
        "tilt_degrees": round(_tilt(list(pieces), directions), 3),
        "burned_in": per_slice([_burned_in(piece) for piece in pieces]),
        "lossy": per_slice([_lossy(piece) for piece in pieces]),
        "monochrome1": any(piece.file.photometric == "MONOCHROME1" for piece in pieces),
        "transfer_syntaxes": sorted({dicom.syntax_name(piece.file.syntax) for piece in pieces}),
        "multiframe": any(piece.file.frames > 1 for piece in pieces),
    }
    return {**facts, "withheld": sorted(withheld)}


def _burned_in(piece: Slice) -> str:
    return {"YES": "yes", "NO": "no"}.get(piece.file.burned_in, "unknown")


def _lossy(piece: Slice) -> bool:
    image = piece.file
    return image.lossy == "01" or (image.syntax in dicom.LOSSY and image.syntax not in dicom.LOSSY_OR_NOT)
