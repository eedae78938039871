"""A set beside the files that it was packed from: every volume read again from its source, and compared bit for bit.

Invariant: a volume counts as equal only if the packer's own readers make of the source the digest that the manifest
names, the very voxels that the shard decodes to, and the same geometry. What could not be compared is named, never
counted as equal; nothing that is said names a patient, a path or a UID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io import privacy
from dinox_io.errors import ShardError
from dinox_io.formats import READERS
from dinox_io.hounsfield import volume_digest
from dinox_io.manifest import EARLIER_FOLDER, read_manifest
from dinox_io.output import OutputFolder
from dinox_io.pack import find_series
from dinox_io.progress import ProgressReport
from dinox_io.series import SeriesRules
from dinox_io.settings import PackSettings
from dinox_io.shardset import ShardSet, VolumeRecord, open_shards
from dinox_io.task import SeriesTask, series_task
from dinox_io.volume import Volume
from dinox_io.withdrawn import withdrawn
from dinox_io.workers import Failure, WorkerPool

_SLICES = 16
"""How many slices of a shard are decoded at once beside the source's volume."""
_RUNS = 8
"""How many runs of slices a message names."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of it. Volumes and series by their pseudonyms, problems in words and figures."""

    equal: list[str] = field(default_factory=list)
    different: list[tuple[str, str]] = field(default_factory=list)
    """(volume, what differs)."""
    without_source: list[str] = field(default_factory=list)
    """Volumes of the set whose series is not in the source: not verified."""
    from_png: list[str] = field(default_factory=list)
    """Volumes that were imported from PNG, whose pictures are not read again: not verified, and not missed."""
    not_packed: list[str] = field(default_factory=list)
    """Series of the source that are neither in the set, nor in rejected.jsonl, nor withdrawn."""

    @property
    def is_whole(self) -> bool:
        """Every volume but those imported from PNG was compared and is equal, and the source holds nothing else."""
        return not (self.different or self.without_source or self.not_packed)

    def lines(self) -> list[str]:
        """For people: what is not equal, a line each, and a last line with the figures."""
        lines = [f"volume {volume}: differs from its source: {problem}" for volume, problem in self.different]
        lines += [f"volume {volume}: not verified, its source is not in INPUT" for volume in self.without_source]
        lines += [f"volume {volume}: imported from PNG: its source cannot be compared here" for volume in self.from_png]
        lines += [
            f"series {series}: in the source, but neither in the set nor in rejected.jsonl: pack INPUT again"
            for series in self.not_packed
        ]
        total = len(self.equal) + len(self.different) + len(self.without_source) + len(self.from_png)
        png = f", {len(self.from_png)} imported from PNG were not compared" if self.from_png else ""
        return [
            *lines,
            f"{len(self.equal)} of {total} volumes are bit for bit their source, {len(self.different)} differ, "
            f"{len(self.without_source)} have no source in INPUT{png}; "
            f"{len(self.not_packed)} series of INPUT are missing",
        ]


@dataclass(frozen=True, kw_only=True)
class _ComparisonTask:
    """One series of the source that the set has, as a worker gets it."""

    series: SeriesTask
    volumes: frozenset[str]
    """Ids of its volumes in the set."""
    rules: tuple[SeriesRules, ...]
    """Of all additions to the set, the last one first: the manifest does not say which series came with which."""
    folder: str
    digest: str
    """Of the manifest."""


def compare_with_source(
    folder: Path, inputs: Sequence[Path], *, progress: ProgressReport, key_file: Path | None = None, workers: int = 1,
    nifti_patient: str | None = None,
) -> Comparison:  # fmt: skip
    """Read the series under `inputs` again, as the packer does, and compare them with the set in `folder`.

    Args:
        key_file: the key that the set was packed with, unless it has its own in private/key.
        workers: processes; each holds one volume at a time.
        nifti_patient: as the set was packed with; NIfTI series are named by their patient too.

    Raises:
        ShardError: the manifest is damaged. ValueError: no key, or not that of the set. PackError: no such input.
    """
    manifest = read_manifest(folder)
    settings = PackSettings(
        inputs=tuple(inputs), output=folder, workers=workers, key_file=key_file, nifti_patient=nifti_patient
    )
    settings.check()
    key = _key(folder, key_file, manifest)
    known: dict[str, set[str]] = {}
    for volume in manifest["volumes"]:
        known.setdefault(volume["series"], set()).add(volume["id"])
    with WorkerPool(workers) as pool:
        found, _ = find_series(settings, key, pool, progress)
        tasks = [
            _ComparisonTask(
                series=series_task(series, rules=SeriesRules(), encoding=("none", 1), known={}),
                volumes=frozenset(known[series.series]),
                rules=_rules(folder, manifest),
                folder=str(folder.absolute()),
                digest=manifest["self"],
            )
            for series in found
            if series.series in known
        ]
        absent = _absent(known, {series.series for series in found})
        from_png = _from_png(folder, absent)
        result = Comparison(
            without_source=[volume for volume in absent if volume not in from_png],
            from_png=[volume for volume in absent if volume in from_png],
            not_packed=_unpacked(folder, found, known),
        )
        progress.stage("comparing", sum(task.series.size for task in tasks))
        for task, outcome in pool.map(compare_series, tasks):
            if isinstance(outcome, Failure):
                reason = f"its source could not be read ({outcome.kind} {outcome.error})".replace(" )", ")")
                outcome = dict.fromkeys(task.volumes, reason)
            for volume, problem in sorted(outcome.items()):
                if problem:
                    result.different.append((volume, problem))
                else:
                    result.equal.append(volume)
            progress.advance(task.series.size)
    return result


def _key(folder: Path, key_file: Path | None, manifest: Mapping[str, Any]) -> bytes:
    path = key_file or folder / "private" / "key"
    try:
        key = privacy.read_key(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: give the --key-file that the set was packed with, without it nobody knows which "
            "volume is which series"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    expected = manifest.get("options", {}).get("key_id")
    if expected not in (None, privacy.key_id(key)):
        raise ValueError(f"{path} is not the key that the set was packed with: give that one as --key-file")
    return key


def _rules(folder: Path, manifest: Mapping[str, Any]) -> tuple[SeriesRules, ...]:
    """The distinct rules of this manifest and of the earlier ones."""
    every = [manifest]
    for path in sorted((folder / EARLIER_FOLDER).glob("*.json")):
        every.append(read_manifest(path))
    names = [one.name for one in fields(SeriesRules)]
    rules = [SeriesRules(**{name: one["options"][name] for name in names if name in one["options"]}) for one in every]
    return tuple(dict.fromkeys(rules))


def _absent(known: Mapping[str, set[str]], found: set[str]) -> list[str]:
    return sorted(volume for series, volumes in known.items() if series not in found for volume in volumes)


def _from_png(folder: Path, volumes: Sequence[str]) -> set[str]:
    """Those of the volumes whose records say that they were imported from PNG; a damaged record says nothing."""
    found: set[str] = set()
    if not volumes:
        return found
    wanted = set(volumes)
    with suppress(ShardError), open_shards(folder) as shards:
        for record in shards.volumes:
            if record.id in wanted:
                with suppress(ShardError):
                    if shards.facts(record).get("source") == "png16":
                        found.add(record.id)
    return found


def _unpacked(folder: Path, found: Sequence[Any], known: Mapping[str, Any]) -> list[str]:
    held = OutputFolder(folder)
    gone = withdrawn(held)
    told = {row.get("series") for row in held.read_rows(held.rejected)} | known.keys()
    return [one.series for one in found if one.series not in told and not gone.holds(one.patient, one.series)]


# --- in a worker -------------------------------------------------------------------------------------------------

_open_set: dict[tuple[str, str], ShardSet] = {}
"""The set that this process compares with: opening reads a little of each volume, which once is enough for."""


def _opened(folder: str, digest: str) -> ShardSet:
    if (folder, digest) not in _open_set:
        while _open_set:
            _open_set.popitem()[1].close()
        shards = open_shards(folder, verify="always")
        if shards.digest != digest:
            shards.close()
            raise ShardError("the set has changed meanwhile: run the command again")
        _open_set[folder, digest] = shards
    return _open_set[folder, digest]


def compare_series(task: _ComparisonTask) -> dict[str, str]:
    """Volume id -> what differs, empty if nothing, of each volume that the set has of a series."""
    one = task.series
    if one.identities > 1:
        return dict.fromkeys(task.volumes, f"its source now holds {one.identities} patients under one series")
    volumes: dict[str, Volume] = {}
    refusal = "there is no such volume"
    for rules in task.rules:
        paths = [Path(path) for path in one.paths]
        try:
            read, rows = READERS[one.format](paths, series=one.series, patient=one.patient, rules=rules, **one.given)
        except OSError:
            return dict.fromkeys(task.volumes, "a file of its source cannot be read")
        volumes = {volume.id: volume for volume in read}
        refusal = ", ".join(row.code for row in rows) or refusal
        if volumes.keys() == task.volumes:
            break
    try:
        shards = _opened(task.folder, task.digest)
    except ShardError as error:
        return dict.fromkeys(task.volumes, str(error))
    records = {record.id: record for record in shards.volumes if record.id in task.volumes}
    problems = {
        name: _difference(shards, records[name], volumes[name]) if name in volumes else f"the source gives {refusal}"
        for name in task.volumes
    }
    for name in volumes.keys() - task.volumes:
        problems[name] = "the source gives this volume too, and the set has it not"
    return problems


def _difference(shards: ShardSet, record: VolumeRecord, volume: Volume) -> str:
    if volume.hu.shape != record.shape:
        return f"it has the shape {volume.hu.shape}, in the set {record.shape}"
    voxels, slices = 0, []
    for start in range(0, record.shape[0], _SLICES):
        stop = min(start + _SLICES, record.shape[0])
        try:
            packed = shards.read(record, start, stop)
        except ShardError as error:
            return str(error)
        in_each = np.count_nonzero(packed != volume.hu[start:stop], axis=(1, 2))
        voxels += int(in_each.sum())
        slices += [start + int(number) for number in np.flatnonzero(in_each)]
    if slices:
        return f"voxels that differ: {voxels}, in {_spelled(slices)} of {record.shape[0]}"
    if volume_digest(volume.hu) != record.digest:
        return "its digest is not the one that the manifest names"
    geometry = (volume.spacing_mm, tuple(volume.z_positions_mm), tuple(volume.orientation), volume.patient)
    if geometry != (record.spacing_mm, tuple(record.z_positions_mm.tolist()), record.orientation, record.patient):
        return "its voxels are equal, its spacing, positions, direction or patient are not"
    return ""


def _spelled(slices: Sequence[int]) -> str:
    """`slice 4`, `slices 0 to 2, 7`; of many runs the first ones."""
    runs: list[list[int]] = []
    for z in slices:
        if runs and z == runs[-1][1] + 1:
            runs[-1][1] = z
        else:
            runs.append([z, z])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    more = f" and {len(texts) - _RUNS} more places" if len(texts) > _RUNS else ""
    return ("slice " if len(slices) == 1 else "slices ") + ", ".join(texts[:_RUNS]) + more
