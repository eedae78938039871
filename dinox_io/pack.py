"""DICOM in, a set of shards out: `pack(settings)`.

Invariant: the same input, options and key give the same bytes, for any number of workers and any order of files. The
set in OUT is at every moment the one before or the one after; a series that is in it is never written again. What was
not packed whole stands in rejected.jsonl, and whom it came from only in OUT/private. A pack that was killed is gone on
with behind its last finished shard, and ends with the same bytes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from dinox_io import codec, privacy
from dinox_io.commit import NewRows, commit, config_digest
from dinox_io.discover import FoundFile, FoundSeries, Grouper, ScannedFile, scan, walk
from dinox_io.errors import ShardError
from dinox_io.filler import ShardFiller
from dinox_io.known import KnownVolume, known_volumes
from dinox_io.manifest import MANIFEST_NAME, read_manifest
from dinox_io.nifti_patient import PatientPattern, files_by_folder
from dinox_io.output import OutputFolder, PackError
from dinox_io.part import PartRecord, rows_digest
from dinox_io.progress import ProgressReport
from dinox_io.ray_pool import RayPool
from dinox_io.report import PackReport, foreign_rows, source_rows
from dinox_io.rules import verdict
from dinox_io.settings import PackSettings, check_same_set, other_options
from dinox_io.shard import ShardSummary
from dinox_io.task import mark_of, pack_series, result_of, series_task, sight_of
from dinox_io.volume import Rejection
from dinox_io.withdrawn import withdrawn
from dinox_io.workers import Failure, WorkerPool

SCAN_FILES = 64
"""Files whose headers one task reads."""

Found = tuple[list[FoundSeries], list[tuple[str, FoundFile]]]
"""The series of an input, in the order in which they are packed, and (code, file) of all files that are of none."""
Find = Callable[[PackSettings, bytes, WorkerPool, ProgressReport], Found]
"""Finds what there is to pack: (settings, key of the pseudonyms, workers, progress)."""


class Packers(Protocol):
    """Where series are packed: a WorkerPool, or the like."""

    def map(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """See WorkerPool.map."""
        ...


def pack(settings: PackSettings, progress: ProgressReport, *, find: Find | None = None) -> PackReport:
    """Pack the series that `find` finds (default: `find_series`) into shards in `settings.output`; see docs/format.md.

    Raises:
        PackError: it could not begin or go on (usage, another packer, disk full, a damaged set); the set in the folder
            is as it was before.
    """
    settings.check()
    whole, known = _set_of_the_whole(settings)
    with (
        OutputFolder(settings.folder).held(keep_interrupted=True) as folder,
        WorkerPool(settings.workers) as pool,
        _packers(settings, pool, progress) as packers,
    ):
        key = settings.key(folder)
        options = settings.options(privacy.key_id(key))
        for previous in (whole, folder.previous):
            check_same_set(settings.output, previous, options)
        known |= known_volumes(folder.path, folder.previous)
        found, foreign = (find or find_series)(settings, key, pool, progress)
        kept = _Input.of(settings, folder, found, foreign)
        summaries, rows = _pack_all(settings, options, folder, kept.series, known, packers, progress)
        new = NewRows(
            sources=source_rows(kept.series, kept.foreign),
            rejected=[asdict(row) for row in [*rows, *kept.rows]],
            seen={series.series for series in kept.series},
        )
        manifest, rejected = commit(folder, options, summaries, new, about=settings.about)
        present = known.keys() | {volume["series"] for volume in (manifest or {"volumes": []})["volumes"]}
        report = PackReport(
            manifest=manifest,
            new_volumes=sum(len(summary.volumes) for summary in summaries),
            series=len(kept.series),
            in_set=sum(series.series in present for series in kept.series),
            codes=sorted({row.code for row in [*rows, *kept.rows]} | {code for code, _ in kept.foreign}),
            rejected=rejected,
            this_run=[*new.rejected, *foreign_rows(kept.foreign)],
            other_options=other_options(folder.previous, options),
            part_of=str(settings.output) if settings.part else None,
            by_folder=files_by_folder(
                (series.format, series.patient_from, series.patient, len(series.files)) for series in found
            ),
        )
        if settings.part:
            _record(settings, options, report, folder).write(folder)
        return report


@contextlib.contextmanager
def _packers(settings: PackSettings, pool: WorkerPool, progress: ProgressReport) -> Iterator[Packers]:
    """The workers here, or those of a Ray cluster, found before anything is read."""
    if settings.ray is None:
        yield pool
        return
    with RayPool(settings.ray, local_cores=settings.workers, sight=sight_of) as far:
        progress.note(far.describe())
        yield far
        if far.repeats:
            progress.note(f"handed out again, as a Ray worker or machine was lost: {far.repeats} series")


def _set_of_the_whole(settings: PackSettings) -> tuple[dict[str, Any] | None, dict[str, dict[str, KnownVolume]]]:
    """The manifest of the set in OUT that a part will be united with, or None; and its volumes by series."""
    if settings.part is None:
        return None, {}
    note = OutputFolder(settings.output).pending_commit()
    if note is not None and settings.part.folder in note["remove"]:
        raise PackError(
            f"a --merge of {settings.output} was interrupted, and has this part already: run --merge again first"
        )
    if not (settings.output / MANIFEST_NAME).exists():
        return None, {}
    try:
        manifest = read_manifest(settings.output)
        return manifest, known_volumes(settings.output, manifest)
    except ShardError as error:
        raise PackError(f"the set in {settings.output} is damaged: {error}. Restore it first") from error


def _record(settings: PackSettings, options: dict[str, Any], report: PackReport, folder: OutputFolder) -> PartRecord:
    assert settings.part is not None
    return PartRecord(
        part=settings.part.number,
        of=settings.part.of,
        options=options,
        codes=report.codes,
        series=report.series,
        in_set=report.in_set,
        manifest=report.manifest["self"] if report.manifest else None,
        rows=rows_digest(folder),
    )


@dataclass(frozen=True)
class _Input:
    """What of the input is packed here."""

    series: list[FoundSeries]
    foreign: list[tuple[str, FoundFile]]
    rows: list[Rejection]
    """Of what is left out before anything of it is read."""

    @classmethod
    def of(
        cls, settings: PackSettings, folder: OutputFolder, found: Sequence[FoundSeries],
        foreign: Sequence[tuple[str, FoundFile]],
    ) -> "_Input":  # fmt: skip
        """This part of it, without the patients who withdrew."""
        part = settings.part
        mine = [series for series in found if part is None or part.holds(series.series)]
        gone = [withdrawn(OutputFolder(path)) for path in {settings.output, folder.path}]
        out = [series for series in mine if any(one.holds(series.patient, series.series) for one in gone)]
        files = sum(len(series.files) for series in out)
        names = {series.series for series in out}
        return cls(
            series=[series for series in mine if series.series not in names],
            foreign=[entry for entry in foreign if part is None or part.holds(entry[1].path)],
            rows=[verdict("WITHDRAWN", series=None, files=files)] if files else [],
        )


# ---------------------------------------------------------------------------------------------- finding


def find_series(settings: PackSettings, key: bytes, pool: WorkerPool, progress: ProgressReport) -> Found:
    """The series of all files under the inputs, by their headers. PackError if --nifti-patient misses a file."""
    pattern = PatientPattern(settings.nifti_patient) if settings.nifti_patient is not None else None
    files = list(walk(settings.inputs, without=settings.output))
    progress.stage("reading headers", sum(max(file.size, 0) for file in files))
    grouper = Grouper(key)
    inside: list[FoundFile] = []
    for scanned in _scanned(pool, files):
        inside += scanned.members
        if not scanned.members:
            grouper.add(_named(scanned, pattern))
        progress.advance(max(scanned.file.size, 0))
    if inside:
        progress.stage("reading headers in archives", sum(file.size for file in inside))
    for scanned in _scanned(pool, inside):
        grouper.add(_named(scanned, pattern))
        progress.advance(scanned.file.size)
    if pattern and pattern.unmatched:
        raise PackError(
            f"--nifti-patient names no patient for {pattern.unmatched} of {pattern.files} NIfTI files: its first group "
            "must be found in the path of every file below INPUT"
        )
    return grouper.result(), grouper.foreign


def _named(scanned: ScannedFile, pattern: PatientPattern | None) -> ScannedFile:
    """A NIfTI file with the patient that the user's pattern gives it."""
    identity, file = scanned.identity, scanned.file
    if pattern is None or identity is None or identity.format != "nifti":
        return scanned
    return replace(scanned, identity=pattern.named(identity, file.path, file.top))


def _scanned(pool: WorkerPool, files: Sequence[FoundFile]) -> Iterator[ScannedFile]:
    lost: list[FoundFile] = []
    chunks = (files[start : start + SCAN_FILES] for start in range(0, len(files), SCAN_FILES))
    for chunk, outcome in pool.map(scan, chunks):
        if isinstance(outcome, Failure):
            lost += chunk
        else:
            yield from outcome
    # One file took its whole chunk with it: alone, each is lost only if it is the one.
    for chunk, outcome in pool.map(scan, ([file] for file in lost)):
        if isinstance(outcome, Failure):
            yield ScannedFile(chunk[0], None, "DICOM_DAMAGED")
        else:
            yield from outcome


# ---------------------------------------------------------------------------------------------- packing


def _pack_all(
    settings: PackSettings, options: dict[str, Any], folder: OutputFolder, found: Sequence[FoundSeries],
    known: Mapping[str, Mapping[str, KnownVolume]], packers: Packers, progress: ProgressReport,
) -> tuple[list[ShardSummary], list[Rejection]]:  # fmt: skip
    tasks = [
        series_task(series, rules=settings.rules, encoding=settings.encoding, known=known.get(series.series, {}))
        for series in found
    ]
    progress.note(codec.describe())
    progress.stage("packing", sum(task.size for task in tasks))
    with contextlib.closing(ShardFiller(folder, settings.shard_bytes, config_digest(options))) as filler:
        position, rows = filler.resume(lambda: [mark_of(task) for task in tasks])
        if position:
            progress.note(f"taken over from an interrupted run: {len(filler.summaries)} shards, {position} series")
            progress.advance(sum(task.size for task in tasks[:position]))
        # Marked when its turn comes, before a worker reads it: a file that is changed later is seen to be another.
        marked = (replace(task, mark=mark_of(task)) for task in tasks[position:])
        for task, outcome in packers.map(pack_series, marked):
            result = result_of(task, outcome)
            rows += result.rows
            filler.add(task, result)
            progress.advance(task.size)
        return filler.finish(), rows
