"""`--merge`: the parts of an array job (OUT/part-I-of-N) become one set in OUT.

    check every part -> link its shards under new numbers, each hashed -> commit -> the folders of the parts go

Invariant: the set has the volumes, digests, sides and rows of one pack of the whole input. Until the commit nothing of
OUT changes but shards that its journal owns; the commit itself says which folders go with it (output.py). Killed at
any moment, the same command again ends with the same set.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinox_io import privacy
from dinox_io.atomic import AtomicFile, fsync_folder
from dinox_io.canonical import canonical_json
from dinox_io.commit import NewRows, commit
from dinox_io.errors import ShardError
from dinox_io.manifest import MANIFEST_NAME, dense_histogram, read_manifest
from dinox_io.output import PART_FOLDER, OutputFolder, PackError, explained, row_bytes
from dinox_io.part import PartRecord, read_record
from dinox_io.progress import ProgressReport
from dinox_io.report import PackReport
from dinox_io.seekable import seek_table_bytes
from dinox_io.settings import PackSettings, check_same_set
from dinox_io.shard import ShardEntry, ShardSummary, VolumeSummary, read_shard_index
from dinox_io.storage import LocalFile
from dinox_io.withdrawn import WITHDRAWN_NAME, withdrawn

MERGED_NAME = "merged.json"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class _FinishedPart:
    folder: OutputFolder
    record: PartRecord
    manifest: Mapping[str, Any] | None

    @property
    def shards(self) -> Sequence[Mapping[str, Any]]:
        return self.manifest["shards"] if self.manifest else []


def merge(settings: PackSettings, progress: ProgressReport) -> PackReport:
    """Unite the parts in `settings.output`, with the set that stands there already if there is one.

    Of the settings: `inputs` is not read; options that were given must be those of the parts; `key_file` is not needed,
    and must be theirs if it is given; `about` as for a pack.

    Raises:
        PackError: parts are missing, not done, damaged, or were packed with different options. The set in the folder is
            as it was before.
    """
    output = OutputFolder(settings.output)
    if not output.path.is_dir():
        raise PackError(f"there is no {output.path}: --merge unites the parts that --part has packed into it")
    with output.held() as folder, contextlib.ExitStack() as locks:
        names = sorted(path.name for path in folder.path.iterdir() if PART_FOLDER.fullmatch(path.name))
        if not names:
            return _merged_before(folder)
        parts = [_finished(OutputFolder(folder.path / name), locks) for name in names]
        parts.sort(key=lambda part: part.record.part % part.record.of)
        _check_complete(folder.path, parts)
        _check_options(settings, folder, parts)
        _check_volumes(folder, parts)
        try:
            summaries = list(_taken_over(folder, parts, progress))
        except PackError:
            folder.drop_unlisted()
            raise
        note = {**_note(parts), "new_volumes": sum(len(summary.volumes) for summary in summaries)}
        files = {folder.private / MERGED_NAME: canonical_json(note) + b"\n", **_withdrawn_rows(folder, parts)}
        options = parts[0].record.options
        about = _about(settings, folder, parts)
        manifest, rejected = commit(folder, options, summaries, _rows(parts), about=about, files=files, remove=names)
        return PackReport(manifest=manifest, rejected=rejected, **note)


def _merged_before(folder: OutputFolder) -> PackReport:
    """What the merge said that there was here before: a second one has nothing to do, and says the same."""
    try:
        note = json.loads((folder.private / MERGED_NAME).read_bytes())
        rejected = folder.read_rows(folder.rejected)
        return PackReport(manifest=folder.previous, rejected=rejected, **{**note, "new_volumes": 0})
    except (OSError, ValueError, TypeError):
        raise PackError(f"there is no part in {folder.path}: pack the parts first, with --part 1/N to N/N") from None


def _note(parts: Sequence[_FinishedPart]) -> dict[str, Any]:
    records = [part.record for part in parts]
    return {
        "series": sum(record.series for record in records),
        "in_set": sum(record.in_set for record in records),
        "codes": sorted({code for record in records for code in record.codes}),
    }


# ------------------------------------------------------------------------------------------------- checks


def _finished(folder: OutputFolder, locks: contextlib.ExitStack) -> _FinishedPart:
    match = PART_FOLDER.fullmatch(folder.path.name)
    assert match is not None
    again = f"run --part {match.group(1)}/{match.group(2)} again, then --merge"
    if not folder.private.is_dir():
        raise PackError(f"{folder.path} is not done: {again}")
    locks.enter_context(folder.locked())
    record = read_record(folder)
    try:
        manifest = read_manifest(folder.path) if (folder.path / MANIFEST_NAME).exists() else None
    except ShardError as error:
        raise PackError(f"{folder.path} is damaged: {error}. Restore it, or delete it and {again}") from error
    if record is None or record.manifest != (manifest["self"] if manifest else None):
        raise PackError(f"{folder.path} is not done, or was changed since: {again}")
    return _FinishedPart(folder=folder, record=record, manifest=manifest)


def _check_complete(path: Path, parts: Sequence[_FinishedPart]) -> None:
    records = [part.record for part in parts]
    if len({record.of for record in records}) > 1:
        found = ", ".join(sorted({f"{record.of}" for record in records}, key=int))
        raise PackError(f"{path} holds parts of different numbers of parts ({found}): delete those that are not meant")
    of = records[0].of
    residues = [record.part % of for record in records]
    twice = [record for record in records if residues.count(record.part % of) > 1]
    if twice:
        names = " and ".join(f"part-{record.part}-of-{of}" for record in twice)
        raise PackError(f"{names} in {path} are the same part (they count from 0 and from 1): delete one")
    missing = [str(residue or of) for residue in range(of) if residue not in residues]
    if missing:
        raise PackError(f"{path} lacks part {', '.join(sorted(missing, key=int))} of {of}: run --part I/{of} for each")


def _check_options(settings: PackSettings, folder: OutputFolder, parts: Sequence[_FinishedPart]) -> None:
    options = parts[0].record.options
    for part in parts[1:]:
        differing = sorted(name for name in options if part.record.options.get(name) != options[name])
        if differing or part.record.options.keys() != options.keys():
            names = ", ".join(differing) or "versions of dinox"
            raise PackError(
                f"{parts[0].folder.path} and {part.folder.path} were packed with different options ({names}): "
                "delete the one that is not meant and run it again"
            )
    check_same_set(folder.path, folder.previous, options)
    given = settings.options(options["key_id"])
    usual = PackSettings(inputs=(), output=settings.output).options(options["key_id"])
    other = sorted(name for name in given if given[name] not in (usual[name], options.get(name)))
    if other:
        raise PackError(f"the parts were packed with another {', '.join(other)}: give --merge the same, or nothing")
    if settings.key_file is not None and privacy.key_id(settings.key(folder)) != options["key_id"]:
        raise PackError(f"the parts in {folder.path} were packed with another key than {settings.key_file}")


def _check_volumes(folder: OutputFolder, parts: Sequence[_FinishedPart]) -> None:
    gone = withdrawn(folder)
    owners = {volume["id"]: "the set" for volume in (folder.previous or {"volumes": []})["volumes"]}
    for part in parts:
        path = part.folder.path
        for volume in part.manifest["volumes"] if part.manifest else []:
            owner = owners.setdefault(volume["id"], path.name)
            if owner != path.name:
                raise PackError(
                    f"volume {volume['id']} of {path} stands in {owner} of {folder.path} too: "
                    f"delete {path} and run --part {part.record.part}/{part.record.of} again"
                )
            if gone.holds(volume["patient"], volume["series"]):
                raise PackError(
                    f"{path} holds a patient who was removed from {folder.path}: "
                    f"delete {path} and run --part {part.record.part}/{part.record.of} again"
                )


# ------------------------------------------------------------------------------------------------- shards


def _taken_over(
    folder: OutputFolder, parts: Sequence[_FinishedPart], progress: ProgressReport
) -> Iterator[ShardSummary]:
    progress.stage("merging", sum(shard["size"] for part in parts for shard in part.shards))
    number = folder.begin()
    for part in parts:
        for shard in part.shards:
            source, target = part.folder.path / shard["name"], folder.shard_path(number)
            try:
                yield _take(folder, source, target, shard, part.manifest or {}, progress.advance)
            except ShardError as error:
                record = part.record
                raise PackError(
                    f"{part.folder.path} is damaged: {error}. Restore the file, or delete {part.folder.path} "
                    f"and run --part {record.part}/{record.of} again; {folder.path} is as it was before"
                ) from error
            number += 1


def _take(
    folder: OutputFolder, source: Path, target: Path, shard: Mapping[str, Any], manifest: Mapping[str, Any],
    advance: Callable[[int], None],
) -> ShardSummary:  # fmt: skip
    """One shard of a part, hashed as it is taken over. ShardError if it is not the one that was packed."""
    with contextlib.closing(LocalFile(source)) as file:
        entries = read_shard_index(file, shard["size"])
        linked = _linked(folder, source, target)
        with explained(folder.path, 0 if linked else shard["size"]), contextlib.ExitStack() as stack:
            copy = None if linked else stack.enter_context(AtomicFile(target))
            digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK_BYTES, shard["size"])))
            for start in range(0, shard["size"], _CHUNK_BYTES):
                chunk = buffer[: min(_CHUNK_BYTES, shard["size"] - start)]
                file.read_into(start, chunk)
                digest.update(chunk)
                if copy is not None:
                    copy.write(chunk)
                advance(len(chunk))
            if digest.hexdigest() != shard["sha256"]:
                raise ShardError("its bytes are not those that were packed", file=file.name)
    return _summary(target.name, shard, entries, {volume["id"]: volume for volume in manifest["volumes"]})


def _linked(folder: OutputFolder, source: Path, target: Path) -> bool:
    """Give a shard its new name as well; False where the file system has no hard links."""
    with explained(folder.path):
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS):
                return False
            raise
        fsync_folder(folder.path)
    return True


def _summary(
    name: str, shard: Mapping[str, Any], entries: Sequence[ShardEntry], volumes: Mapping[str, Mapping[str, Any]]
) -> ShardSummary:
    listed = [(member["id"], member["meta_sha256"], member["seek_table_sha256"]) for member in shard["volumes"]]
    if [(entry.meta.id, entry.meta_sha256, entry.seek_table_sha256) for entry in entries] != listed:
        raise ShardError("differs from the manifest", file=shard["name"])
    return ShardSummary(
        name=name,
        size=shard["size"],
        sha256=shard["sha256"],
        volumes=tuple(_volume_summary(entry, volumes[entry.meta.id]) for entry in entries),
        histogram=dense_histogram(shard["hu_histogram"]),
    )


def _volume_summary(entry: ShardEntry, volume: Mapping[str, Any]) -> VolumeSummary:
    return VolumeSummary(
        id=entry.meta.id,
        patient=entry.meta.patient,
        series=entry.meta.series,
        shape=entry.meta.shape,
        spacing_mm=entry.meta.spacing_mm,
        digest=volume["digest"],
        offset=entry.offset,
        meta_bytes=entry.meta_bytes,
        body_bytes=int(entry.frames["compressed"].sum()) + seek_table_bytes(entry.meta.shape[0]),
        meta_sha256=entry.meta_sha256,
        seek_table_sha256=entry.seek_table_sha256,
    )


# --------------------------------------------------------------------------------------------------- rows


def _rows(parts: Sequence[_FinishedPart]) -> NewRows:
    sources = [row for part in parts for row in part.folder.read_rows(part.folder.sources)]
    rejected = [row for part in parts for row in part.folder.read_rows(part.folder.rejected)]
    return NewRows(
        sources=sources,
        rejected=rejected,
        seen={row["series"] for row in sources if "series" in row},
    )


def _withdrawn_rows(folder: OutputFolder, parts: Sequence[_FinishedPart]) -> dict[Path, bytes]:
    """Who was removed from a part stays out of the whole."""
    marks = set().union(*(withdrawn(part.folder).marks for part in parts))
    if not marks:
        return {}
    rows = [{"sha256": mark} for mark in sorted(marks | withdrawn(folder).marks)]
    return {folder.private / WITHDRAWN_NAME: row_bytes(rows, ascii_only=True)}


def _about(settings: PackSettings, folder: OutputFolder, parts: Sequence[_FinishedPart]) -> Mapping[str, Any] | None:
    """What --merge was given; else what the parts were given, which must agree; else what the set has."""
    if settings.about is not None:
        return settings.about
    said = {canonical_json(part.manifest["about"]) for part in parts if part.manifest and part.manifest.get("about")}
    if len(said) > 1:
        raise PackError(f"the parts in {folder.path} say different things of the data set: give --merge the --about")
    return json.loads(said.pop()) if said else None
