"""Marks on the volumes of a set: found by series and z.

Invariant: a mark touches a slice only where their positions agree within a tolerance; what finds no slice is counted,
never moved to the nearest one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinox_io.labels import LabelError, LabelUsageError, Mark, count_labels, write_labels
from dinox_io.output import OutputFolder
from dinox_io.privacy import key_of_set, pseudonym
from dinox_io.shardset import ShardSet, VolumeRecord
from dinox_io.verify import is_set_folder

TOLERANCE_MM = 0.1
"""How far a mark's z may lie from its slice: positions are rounded in many ways, and no CT steps by a tenth of a mm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedMark:
    """The slices of one volume that a mark touches."""

    number: int
    """Place of the mark among those that were joined."""
    mark: Mark
    slices: np.ndarray
    """int64 (s,), ascending: slices of the volume."""
    mask_slices: np.ndarray
    """int64 (s,): the same slices in the mark's mask; empty where it has none."""

    def mask(self) -> np.ndarray:
        """bool (s, rows, columns) over the box of the mark. LabelError if it has no mask."""
        if self.mark.mask is None:
            raise LabelError(f"mark {self.number} has no mask")
        return self.mark.mask.decode()[self.mask_slices]


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedMarks:
    """Where the marks are in a set, and how many are not."""

    by_volume: dict[int, list[PlacedMark]]
    """Index in `shards.volumes` -> its marks, in the order given. A mark may touch several volumes of one series."""
    placed: int
    """Marks that touch a slice at least."""
    partial: int
    """Marks among them whose mask has slices that the set has not."""
    outside: int
    """Marks of a series of the set none of whose slices it has."""
    foreign: int
    """Marks of series that are not in the set."""


def join(marks: Sequence[Mark], shards: ShardSet, tolerance_mm: float = TOLERANCE_MM) -> JoinedMarks:
    """Find the slices of each mark, within `tolerance_mm` along the slice normal.

    A mark with a mask touches the slices of its mask, one without all slices from its first to its last z. A series
    that was split at its gaps has several volumes: each gets the slices that it holds.

    Raises:
        LabelError: a box leaves the slices of its series, or two slices of a mask fall on one: other pixels are meant.
    """
    volumes: dict[str, list[VolumeRecord]] = defaultdict(list)
    for volume in shards.volumes:
        volumes[volume.series].append(volume)
    by_volume: dict[int, list[PlacedMark]] = defaultdict(list)
    placed = partial = outside = foreign = 0
    for number, mark in enumerate(marks):
        if mark.series not in volumes:
            foreign += 1
            continue
        parts = [(volume, _place(number, mark, volume, tolerance_mm)) for volume in volumes[mark.series]]
        for volume, part in parts:
            if len(part.slices):
                by_volume[volume.index].append(part)
        found = sum(len(part.slices) for _, part in parts)
        placed, outside = placed + (found > 0), outside + (found == 0)
        partial += mark.mask is not None and 0 < found < len(mark.mask.z_mm)
    return JoinedMarks(
        by_volume=dict(sorted(by_volume.items())), placed=placed, partial=partial, outside=outside, foreign=foreign
    )


def _place(number: int, mark: Mark, volume: VolumeRecord, tolerance_mm: float) -> PlacedMark:
    where = f"mark {number} of series {mark.series}"
    if mark.box[4] > volume.shape[1] or mark.box[5] > volume.shape[2]:
        raise LabelError(
            f"{where} goes to row {mark.box[4] - 1} and column {mark.box[5] - 1}, but a slice has "
            f"{volume.shape[1]} x {volume.shape[2]}: it was made on other images"
        )
    z_mm = volume.z_positions_mm
    if mark.mask is None:
        inside = (z_mm >= mark.box[0] - tolerance_mm) & (z_mm <= mark.box[3] + tolerance_mm)
        return PlacedMark(number=number, mark=mark, slices=np.flatnonzero(inside), mask_slices=np.zeros(0, np.int64))
    wanted = np.array(mark.mask.z_mm)
    right = np.clip(np.searchsorted(z_mm, wanted), 1, len(z_mm) - 1) if len(z_mm) > 1 else np.zeros(len(wanted), int)
    left = np.maximum(right - 1, 0)
    nearest = np.where(np.abs(z_mm[left] - wanted) <= np.abs(z_mm[right] - wanted), left, right)
    rows = np.flatnonzero(np.abs(z_mm[nearest] - wanted) <= tolerance_mm)
    slices = nearest[rows]
    if len(np.unique(slices)) < len(slices):
        raise LabelError(f"{where}: two slices of its mask lie on one slice of volume {volume.id}")
    return PlacedMark(number=number, mark=mark, slices=slices, mask_slices=rows)


def unchanging(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps packing and removing away from the set in `folder` while labels are made for it.

    Otherwise marks of a patient who is removed meanwhile could come back. PackError, on entering, if one is at work. A
    copy without `private/` is not packed into, and needs no lock.
    """
    output = OutputFolder(folder)
    return output.locked() if output.private.is_dir() else contextlib.nullcontext()


def check_given(labels: Path, folder: Path) -> None:
    """LabelUsageError unless `labels` is a file, and `folder` holds a set of shards."""
    if labels.is_dir() and folder.is_file():
        raise LabelUsageError(f"{labels} is a folder and {folder} a file: give them the other way round")
    if labels.is_dir():
        raise LabelUsageError(f"{labels} is a folder: name the file in it")
    if not labels.is_file():
        raise LabelUsageError(f"there is no file {labels}")
    if not folder.is_dir():
        raise LabelUsageError(f"{folder} is a file, no folder" if folder.is_file() else f"there is no folder {folder}")
    if not is_set_folder(folder):
        raise LabelUsageError(f"{folder} is not a set of shards: give the folder that pack_shards made")


def given_key(shards: ShardSet, folder: Path, key_file: Path | None) -> bytes:
    """The key of the set in `folder`. LabelUsageError if it is not there, or another set's."""
    try:
        return key_of_set(folder / "private", shards.manifest["options"].get("key_id", ""), key_file)
    except ValueError as error:
        raise LabelUsageError(str(error)) from None


def put_labels(path: Path, marks: Sequence[Mark]) -> str:
    """Write labels, at least one mark, and say so: `22 marks written to PATH`, or how many it had before.

    LabelError for no marks: an empty file must not take the place of labels. OSError of the disk.
    """
    if not marks:
        raise LabelError("there are no marks to write: nothing was written")
    before = count_labels(path)
    write_labels(path, marks)
    if before is None:
        return f"{len(marks)} marks written to {path}"
    return f"replaced {before} marks by {len(marks)} in {path}"


def of_set(marks: Iterable[Mark], shards: ShardSet, key: bytes) -> tuple[list[Mark], int]:
    """Marks by SeriesInstanceUID as marks of a set: series become pseudonyms.

    Marks of series that the set does not hold are left out: of what was rejected or withdrawn, nothing comes back.

    Args:
        marks: their `series` is the SeriesInstanceUID, or already a pseudonym of the set.
        shards: the set.
        key: the key that the set's pseudonyms were made with; see `privacy.key_of_set`.

    Returns:
        the marks of the set, and how many were left out.
    """
    known = {volume.series for volume in shards.volumes}
    chosen: list[Mark] = []
    left_out = 0
    for mark in marks:
        name = mark.series if mark.series in known else pseudonym(key, "series", mark.series)
        if name in known:
            chosen.append(dataclasses.replace(mark, series=name))
        else:
            left_out += 1
    return chosen, left_out
