"""DICOM in, a set of shards out: `pack(settings)`.

Invariant: the same input, options and key give the same bytes, for any number of workers and any order of files. The
set in OUT is at every moment the one before or the one after; a series that is in it is never written again. What was
not packed whole stands in rejected.jsonl, and whom it came from only in OUT/private.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinox_io import privacy, split
from dinox_io.canonical import canonical_json
from dinox_io.discover import FoundFile, FoundSeries, Grouper, ScannedFile, scan, walk
from dinox_io.formats import READERS
from dinox_io.hounsfield import ENCODING, volume_digest
from dinox_io.manifest import build_manifest
from dinox_io.output import OutputFolder, PackError, explained
from dinox_io.progress import ProgressReport
from dinox_io.report import PackReport, merge_rejected, merge_sources, rejected_by_code
from dinox_io.rules import verdict
from dinox_io.series import SeriesRules
from dinox_io.shard import PACKER, EncodedVolume, ShardSummary, ShardWriter, encode_volume
from dinox_io.volume import Rejection
from dinox_io.workers import TIMEOUT_S, Failure, WorkerPool

SCAN_FILES = 64
"""Files whose headers one task reads."""
FILTER, LEVEL = "hilp", 1


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What to pack, where to, and how. `key_file` None: the set's own random key."""

    inputs: tuple[Path, ...]
    output: Path
    workers: int = 1
    shard_bytes: int = 512 << 20
    rules: SeriesRules = field(default_factory=SeriesRules)
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    split_seed: int = 0
    key_file: Path | None = None

    def check(self) -> None:
        """Raise PackError for settings that cannot be meant."""
        missing = [path for path in self.inputs if not path.exists()]
        if missing or not self.inputs:
            raise PackError(
                f"there is no {missing[0]}: give files or folders of DICOM" if missing else "nothing to pack"
            )
        if self.workers < 1 or self.rules.min_slices < 1 or self.shard_bytes < 1:
            raise PackError("--workers, --min-slices and --shard-size must be at least 1")
        if self.output.exists() and not self.output.is_dir():
            raise PackError(f"{self.output} is a file: --output needs a folder")
        try:
            split.check_fractions(self.val_fraction, self.test_fraction)
        except ValueError as error:
            raise PackError(str(error)) from None

    def options(self, key: bytes) -> dict[str, Any]:
        """What the manifest records: everything that the result depends on."""
        return {
            **asdict(self.rules),
            "shard_bytes": self.shard_bytes,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
            "split_seed": self.split_seed,
            "key_id": privacy.key_id(key),
            "filter": FILTER,
            "level": LEVEL,
            "encoding": ENCODING,
        }


@dataclass(frozen=True, kw_only=True)
class SeriesTask:
    """One series, as a worker gets it."""

    paths: tuple[str, ...]
    size: int
    series: str
    patient: str
    patient_from: str
    identities: int
    rules: SeriesRules
    format: str
    given: Mapping[str, Any]
    known: Mapping[str, str]
    """Volume id -> digest of this series in the set already."""


@dataclass(frozen=True, kw_only=True)
class SeriesResult:
    """What a worker made of a series."""

    volumes: list[EncodedVolume] = field(default_factory=list)
    rows: list[Rejection] = field(default_factory=list)


Found = tuple[list[FoundSeries], list[tuple[str, FoundFile]]]
"""The series of an input, in the order in which they are packed, and (code, file) of all files that are of none."""
Find = Callable[[PackSettings, bytes, WorkerPool, ProgressReport], Found]
"""Finds what there is to pack: (settings, key of the pseudonyms, workers, progress)."""


def pack(settings: PackSettings, progress: ProgressReport, *, find: Find | None = None) -> PackReport:
    """Pack the series that `find` finds (default: `find_series`) into shards in `settings.output`; see docs/format.md.

    Raises:
        PackError: it could not begin or go on (usage, another packer, disk full, a damaged set); the set in the folder
            is as it was before.
    """
    settings.check()
    with OutputFolder(settings.output).held() as folder, WorkerPool(settings.workers) as pool:
        key = _key(settings, folder)
        options = settings.options(key)
        _check_same_set(folder, options)
        found, foreign = (find or find_series)(settings, key, pool, progress)
        summaries, rows = _pack_all(settings, options, folder, found, pool, progress)
        return _commit(settings, options, folder, found, foreign, summaries, rows)


def _key(settings: PackSettings, folder: OutputFolder) -> bytes:
    own = folder.private / "key"
    try:
        if settings.key_file is not None:
            return privacy.read_key(settings.key_file)
        if folder.previous is not None and not own.exists():
            raise PackError(f"the set in {folder.path} was packed with a key file: give the same --key-file")
        with explained(folder.path):
            return privacy.own_key(folder.private)
    except ValueError as error:
        raise PackError(f"{settings.key_file or own}: {error}") from None
    except OSError as error:
        raise PackError(f"the key file {settings.key_file} cannot be read: {error.strerror}") from None


def _check_same_set(folder: OutputFolder, options: Mapping[str, Any]) -> None:
    """A set has one key and one split: another key would make new patients of old ones."""
    before = folder.previous["options"] if folder.previous else {}
    for name, flag in (
        ("key_id", "key (--key-file)"), ("split_seed", "--split-seed"), ("val_fraction", "--val-fraction"),
        ("test_fraction", "--test-fraction"),
    ):  # fmt: skip
        if name in before and before[name] != options[name]:
            was = "" if name == "key_id" else f" ({before[name]}, not {options[name]})"
            raise PackError(
                f"the set in {folder.path} was packed with another {flag}{was}: give the same, or another --output"
            )


# ---------------------------------------------------------------------------------------------- finding


def find_series(settings: PackSettings, key: bytes, pool: WorkerPool, progress: ProgressReport) -> Found:
    """The series of all files under the inputs, by their headers."""
    files = list(walk(settings.inputs, without=settings.output))
    progress.stage("reading headers", sum(max(file.size, 0) for file in files))
    grouper = Grouper(key)
    for scanned in _scanned(pool, files):
        grouper.add(scanned)
        progress.advance(max(scanned.file.size, 0))
    return grouper.result(), grouper.foreign


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


def pack_series(task: SeriesTask) -> SeriesResult:
    """Read and compress one series. Runs in a worker."""
    if task.identities > 1:
        return _refused(task, "MIXED_PATIENTS", count=task.identities)
    try:
        paths = [Path(path) for path in task.paths]
        read = READERS[task.format]
        volumes, rows = read(paths, series=task.series, patient=task.patient, rules=task.rules, **task.given)
    except OSError:
        return _refused(task, "FILE_UNREADABLE")
    if task.known and volumes:
        if {volume.id: volume_digest(volume.hu) for volume in volumes} != dict(task.known):
            return _refused(task, "SERIES_CHANGED")
        return SeriesResult(rows=rows)
    for volume in volumes:
        volume.facts["patient_from"] = task.patient_from
    encoded = [encode_volume(volume, filter=FILTER, level=LEVEL) for volume in volumes]
    return SeriesResult(volumes=encoded, rows=rows)


def _refused(task: SeriesTask, code: str, **figures: float | int | str) -> SeriesResult:
    return SeriesResult(rows=[verdict(code, series=task.series, files=len(task.paths), **figures)])


def _failed(task: SeriesTask, failure: Failure) -> SeriesResult:
    if failure.kind == "error":
        return _refused(task, "INTERNAL_ERROR", error=failure.error)
    if failure.kind == "timeout":
        return _refused(task, "WORKER_TIMEOUT", seconds=TIMEOUT_S)
    return _refused(task, "WORKER_CRASHED" if failure.kind == "crashed" else "WORKER_MEMORY")


def _pack_all(
    settings: PackSettings, options: dict[str, Any], folder: OutputFolder, found: Sequence[FoundSeries],
    pool: WorkerPool, progress: ProgressReport,
) -> tuple[list[ShardSummary], list[Rejection]]:  # fmt: skip
    known = known_volumes(folder.previous)
    tasks = [
        SeriesTask(
            paths=tuple(file.path for file in series.files),
            size=series.size,
            series=series.series,
            patient=series.patient,
            patient_from=series.patient_from,
            identities=len(series.identities),
            rules=settings.rules,
            format=series.format,
            given=series.given,
            known=known.get(series.series, {}),
        )
        for series in found
    ]
    progress.stage("packing", sum(task.size for task in tasks))
    rows: list[Rejection] = []
    with _Shards(folder, settings.shard_bytes, config_digest(options)) as shards:
        for task, outcome in pool.map(pack_series, tasks):
            result = _failed(task, outcome) if isinstance(outcome, Failure) else outcome
            rows += result.rows
            for volume in result.volumes:
                shards.add(volume)
            progress.advance(task.size)
        return shards.finish(), rows


def known_volumes(manifest: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """Of a manifest: series pseudonym -> {volume id: digest}."""
    known: dict[str, dict[str, str]] = {}
    for volume in manifest["volumes"] if manifest else []:
        known.setdefault(volume["series"], {})[volume["id"]] = volume["digest"]
    return known


def config_digest(options: Mapping[str, Any]) -> str:
    """sha256 of the options as canonical JSON: stands in every shard."""
    return hashlib.sha256(canonical_json(dict(options))).hexdigest()


class _Shards:
    """Fills shards up to a size; a larger volume stands alone. As a context manager it leaves no unfinished shard."""

    def __init__(self, folder: OutputFolder, shard_bytes: int, digest: str) -> None:
        self._folder, self._shard_bytes, self._digest = folder, shard_bytes, digest
        self._writer: ShardWriter | None = None
        self._filled = False
        self._number = -1
        self._summaries: list[ShardSummary] = []

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abort()

    def add(self, volume: EncodedVolume) -> None:
        size = ShardWriter.member_bytes(volume)
        if self._writer is not None and self._filled and self._writer.size_bytes + size > self._shard_bytes:
            self._close()
        with explained(self._folder.path, size):
            if self._writer is None:
                self._number = self._folder.begin() if self._number < 0 else self._number + 1
                self._writer = ShardWriter(self._folder.shard_path(self._number), config_digest=self._digest)
                self._filled = False
            self._writer.add(volume)
            self._filled = True

    def finish(self) -> list[ShardSummary]:
        self._close()
        return self._summaries

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with explained(self._folder.path):
                self._summaries.append(writer.finish())


# ---------------------------------------------------------------------------------------------- committing


def _commit(
    settings: PackSettings, options: dict[str, Any], folder: OutputFolder, found: Sequence[FoundSeries],
    foreign: Sequence[tuple[str, FoundFile]], summaries: Sequence[ShardSummary], rows: Sequence[Rejection],
) -> PackReport:  # fmt: skip
    sources = merge_sources(folder.read_rows(folder.sources), found, foreign)
    rejected = merge_rejected(folder.read_rows(folder.rejected), rows, {series.series for series in found}, sources)
    folder.write_rows(folder.sources, sources, mode=0o600)
    folder.write_rows(folder.rejected, rejected, mode=0o644)
    volumes = [(v["id"], v["patient"], v["digest"]) for v in (folder.previous or {"volumes": []})["volumes"]]
    volumes += [(v.id, v.patient, v.digest) for summary in summaries for v in summary.volumes]
    manifest = None
    if volumes:
        sides, leaks = _sides(settings, volumes)
        files = [size for row in sources for _, size in row["files"]]
        manifest = build_manifest(
            summaries,
            sides=sides,
            options=options,
            rejected_by_code=rejected_by_code(rejected),
            config_digest=config_digest(options),
            leaks=leaks,
            packer=PACKER,
            sources={"files": len(files), "bytes": sum(files)},
            previous=folder.previous,
        )
        manifest = folder.commit(manifest)
    return PackReport(
        manifest=manifest,
        new_volumes=sum(len(summary.volumes) for summary in summaries),
        series=[series.series for series in found],
        codes=sorted({row.code for row in rows} | {code for code, _ in foreign}),
        rejected=rejected,
    )


def _sides(
    settings: PackSettings, volumes: Sequence[tuple[str, str, str]]
) -> tuple[dict[str, split.Side], list[dict[str, object]]]:
    sides: dict[str, split.Side] = {
        patient: split.side_of(patient, settings.split_seed, settings.val_fraction, settings.test_fraction)
        for _, patient, _ in volumes
    }
    return split.resolve_leaks(volumes, sides)
