"""A patient withdraws: `remove_patient` takes what a set holds of one, out of every file of it, and keeps it out.

    private/removing.json (the plan) -> new shards -> manifest.json, index.msgpack (the commit) -> all else is deleted
    -> private/removing.json goes

Invariant: the set is whole at every moment, with the patient or without. The plan stands in the journal before anything
is changed and is carried out from there: killed at any moment, the next command that holds the folder completes it, and
deletes no shard but those that the plan names or that came after it. When the journal is gone, no file of OUT holds a
pseudonym, a digest, a pixel, a path or a UID of what was removed. What stays is a sha256 in private/withdrawn.jsonl, by
which a later pack knows it again, and the digests of the manifests that held it (`removed` in manifest.json).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinox_io import split
from dinox_io.atomic import atomic_file, fsync_folder, write_atomically
from dinox_io.errors import ShardError
from dinox_io.index import INDEX_NAME
from dinox_io.manifest import EARLIER_FOLDER, MANIFEST_NAME, build_manifest, complete_set, read_manifest, write_set
from dinox_io.output import PART_FOLDER, OutputFolder, PackError, explained, row_bytes
from dinox_io.report import rejected_by_code
from dinox_io.rewrite import rewrite_shard
from dinox_io.shard import ShardSummary
from dinox_io.storage import LocalFile
from dinox_io.withdrawn import WITHDRAWN_NAME, mark_of_withdrawn
from dinox_io.withdrawn import Withdrawn as Withdrawn
from dinox_io.withdrawn import withdrawn as withdrawn

JOURNAL_NAME, LABELS_FOLDER = "removing.json", "labels"
_PSEUDONYM = re.compile(r"[0-9a-f]{32}")
_SHARD = re.compile(r"shard-(\d{6,})\.tar")
_SEARCH_BYTES = 1 << 28


# --- what was done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What `remove_patient` has done."""

    pseudonym: str
    series: int
    """How many series it was, packed or rejected; 0: nothing was left, it had been removed before."""
    volumes: int
    rewritten: tuple[str, ...]
    """Names of the new shards, which hold what else the old ones held."""
    deleted: tuple[str, ...]
    """Names of the shards that held the patient."""
    manifests: tuple[str, ...]
    """Digests of all sets that ever held someone who was removed, this one's included."""
    emptied: bool
    """Nothing else was in the set: it is no set any more."""
    named_in: tuple[str, ...]
    """Files of OUT that packing does not know, and that name what was removed: they are left as they are."""
    foreign_files: bool
    """private/sources.jsonl lists files of no series, of which nobody knows whose they are."""

    def lines(self) -> list[str]:
        """For people. Names no one but by the pseudonym that they gave."""
        if not self.series:
            lines = [f"{self.pseudonym} was removed before: nothing of it is left, and it is kept out."]
        else:
            shards = (
                f"{len(self.deleted)} shards held it and were deleted; what else they held stands in "
                f"{len(self.rewritten)} shards that were written anew."
            )
            lines = [
                f"Removed {self.pseudonym}: {self.series} series, {self.volumes} of the volumes in the set.",
                f"{shards if self.deleted else 'No shard held it.'} It is kept out when the same input comes again.",
            ]
        if self.emptied:
            lines.append("The set held nothing else: manifest.json, the index and the earlier manifests are gone too.")
        if self.manifests:
            digests = ", ".join(self.manifests)
            lines.append(
                f"Runs that trained on the set before (digest {digests}) can be found by that digest, shards in "
                "their env.json; they will refuse to go on."
            )
        if self.foreign_files:
            lines.append(
                "private/sources.jsonl also lists files that belong to no series, by their paths: look there whether "
                "any of them is of this patient."
            )
        if self.named_in:
            lines.append(f"Still named in files that packing did not write, delete them: {', '.join(self.named_in)}.")
        lines.append("Copies and backups of the set elsewhere still hold it: remove it there too.")
        return lines


# --- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that the steps need, written down before the first of them, since later ones delete where it came from."""

    pseudonym: str
    series: list[str]
    volumes: list[str]
    old_shards: list[str]
    first_shard: int
    """Number of the first new shard."""
    manifests: list[str]
    """Digests of the manifests that hold it, the one that stands in the folder included."""
    emptied: bool
    kept_out: list[str] = field(default_factory=list)
    """Series that the manifest has under another patient: a later pack knows them by themselves."""


def remove_patient(folder: OutputFolder, pseudonym: str) -> Removal:
    """Remove all that a set holds of one patient, or of one series, by its pseudonym (32 hex digits).

    Args:
        folder: the folder of the set, held. Its `previous` is the new manifest afterwards.

    Raises:
        PackError: nobody has this pseudonym, parts wait to be merged, or it cannot be written (then the next command
            completes it). ShardError: a shard that must be written anew is damaged; the set is as it was before.
    """
    if not _PSEUDONYM.fullmatch(pseudonym):
        raise PackError(f"{pseudonym!r} is no pseudonym: --remove takes the 32 hex digits of a patient or of a series")
    parts = sorted(path.name for path in folder.path.iterdir() if PART_FOLDER.fullmatch(path.name))
    if parts:
        raise PackError(f"{folder.path / parts[0]} is not merged: run --merge, or delete the parts, then remove")
    plan = _planned(folder, pseudonym)
    if not plan.series:
        if mark_of_withdrawn(pseudonym) not in withdrawn(folder).marks:
            raise PackError(
                f"no patient and no series of {folder.path} has the pseudonym {pseudonym}: "
                "private/sources.jsonl says which pseudonym is whose"
            )
        return _removal(folder, plan, ())
    with explained(folder.path):
        _drop_interrupted_pack(folder)
        _replace(folder.private / JOURNAL_NAME, json.dumps(asdict(plan), sort_keys=True).encode(), 0o600)
    return _carry_out(folder, plan)


def finish_interrupted(folder: OutputFolder) -> None:
    """Complete a removal that was killed in `folder`, if there is one. Raises as remove_patient does."""
    journal = folder.private / JOURNAL_NAME
    try:
        members = json.loads(journal.read_bytes())
        plan = _Plan(**members)
    except FileNotFoundError:
        return
    except (ValueError, TypeError):
        raise PackError(f"{journal} is damaged: restore it, or delete it and run --remove again") from None
    if folder.previous is None and not plan.emptied:
        raise PackError(f"{folder.path / MANIFEST_NAME} is missing, and a removal was interrupted here: restore it")
    _carry_out(folder, plan)


def _planned(folder: OutputFolder, pseudonym: str) -> _Plan:
    def is_meant(row: Mapping[str, Any]) -> bool:
        return pseudonym in (row.get("patient"), row.get("series"))

    manifests = [folder.previous] if folder.previous else []
    manifests += [read_manifest(path) for path in sorted((folder.path / EARLIER_FOLDER).glob("*.json"))]
    rows = [volume for manifest in manifests for volume in manifest["volumes"]]
    rows += [row for file in (folder.sources, folder.rejected) for row in folder.read_rows(file) if row.get("series")]
    series = {row["series"] for row in rows if is_meant(row)}  # whole ones: rows need not agree on whose one is
    held = [manifest for manifest in manifests if any(volume["series"] in series for volume in manifest["volumes"])]
    volumes = {v["id"]: v for manifest in held for v in manifest["volumes"] if v["series"] in series}
    return _Plan(
        pseudonym=pseudonym,
        series=sorted(series),
        volumes=sorted(volumes),
        old_shards=sorted({name for manifest in held for name in _shards_with(manifest, volumes)}),
        first_shard=1 + max(map(_number, _listed(folder.previous)), default=-1),
        manifests=sorted(manifest["self"] for manifest in held),
        emptied=folder.previous is not None and all(v["id"] in volumes for v in folder.previous["volumes"]),
        kept_out=sorted({v["series"] for v in volumes.values() if not is_meant(v)}),
    )


def _shards_with(manifest: Mapping[str, Any], volumes: Collection[str]) -> Iterator[str]:
    for shard in manifest["shards"]:
        if any(member["id"] in volumes for member in shard["volumes"]):
            yield shard["name"]


def _listed(manifest: Mapping[str, Any] | None) -> set[str]:
    return {shard["name"] for shard in manifest["shards"]} if manifest else set()


def _number(name: str) -> int:
    return int(match.group(1)) if (match := _SHARD.fullmatch(name)) else -1


# --- carrying it out ---------------------------------------------------------------------------------------------


def _carry_out(folder: OutputFolder, plan: _Plan) -> Removal:
    """The steps from the plan on; each does nothing where it was done before."""
    with explained(folder.path):
        rejected = [row for row in folder.read_rows(folder.rejected) if row["series"] not in plan.series]
        sources = [row for row in folder.read_rows(folder.sources) if row.get("series") not in plan.series]
        written: tuple[str, ...] = ()
        if folder.previous is not None and plan.emptied:
            (folder.path / MANIFEST_NAME).unlink()
            fsync_folder(folder.path)
            folder.previous = None
        elif folder.previous is not None:
            written = _commit_without(folder, folder.previous, plan, rejected, sources)
        _purge(folder, plan, rejected, sources)
        removal = _removal(folder, plan, written)
        (folder.private / JOURNAL_NAME).unlink()
        fsync_folder(folder.private)
    return removal


def _commit_without(
    folder: OutputFolder, before: dict[str, Any], plan: _Plan, rejected: Sequence[dict[str, Any]],
    sources: Sequence[dict[str, Any]],
) -> tuple[str, ...]:  # fmt: skip
    """Write the shards that held it anew, and commit the set that is left; names of the new shards."""
    old = [shard for shard in before["shards"] if shard["name"] in plan.old_shards]
    _delete_shards(folder, (name for name in _on_disk(folder, plan.first_shard) if name not in _listed(before)))
    try:
        summaries = _rewritten(folder, before, old, plan)
        manifest = _manifest_without(before, plan, [shard["name"] for shard in old], summaries, rejected, sources)
        complete, index = complete_set(folder.path, manifest)
    except ShardError:
        # A damaged shard: nothing is committed, and other work on the set must not be stopped by the journal.
        _delete_shards(folder, (name for name in _on_disk(folder, plan.first_shard) if name not in _listed(before)))
        (folder.private / JOURNAL_NAME).unlink()
        raise
    write_set(folder.path, complete, index, keep_previous=before["self"] not in plan.manifests)
    folder.previous = complete
    return tuple(summary.name for summary in summaries)


def _rewritten(
    folder: OutputFolder, before: Mapping[str, Any], old: Sequence[Mapping[str, Any]], plan: _Plan
) -> list[ShardSummary]:
    digests = {volume["id"]: volume["digest"] for volume in before["volumes"]}
    summaries: list[ShardSummary] = []
    for shard in old:
        if all(member["id"] in plan.volumes for member in shard["volumes"]):
            continue
        path = folder.shard_path(plan.first_shard + len(summaries))
        with closing(LocalFile(folder.path / shard["name"])) as file:
            summaries.append(rewrite_shard(file, shard, path, set(plan.volumes), digests))
    return summaries


def _manifest_without(
    before: dict[str, Any], plan: _Plan, dropped: Sequence[str], summaries: Sequence[ShardSummary],
    rejected: Sequence[dict[str, Any]], sources: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    left = [volume for volume in before["volumes"] if volume["id"] not in plan.volumes]
    sides, leaks = _sides(before, left)
    sizes = [size for row in sources for _, size in row["files"]]
    earlier = before.get("removed") or {"volumes": 0, "manifests": []}
    removed = {
        "volumes": earlier["volumes"] + len(before["volumes"]) - len(left),
        "manifests": sorted({*earlier["manifests"], *plan.manifests}),
    }
    return build_manifest(
        summaries,
        sides=sides,
        options=before["options"],
        rejected_by_code=rejected_by_code(rejected),
        config_digest=before["config_digest"],
        leaks=leaks,
        packer=before["packer"],
        sources={"files": len(sizes), "bytes": sum(sizes)} if sources else before["sources"],
        previous=before,
        dropped=dropped,
        removed=removed if removed["manifests"] else None,
    )


def _sides(before: Mapping[str, Any], left: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[Any]]:
    """The rule over what is left: where equal pixels of two sides are gone, the other volume has its side again."""
    options = before["options"]
    try:
        rule = (int(options["split_seed"]), float(options["val_fraction"]), float(options["test_fraction"]))
    except KeyError:  # a set of another packer: its sides are its own
        names = {volume["id"] for volume in left}
        leaks = [leak for leak in before["leaks"] if names.issuperset(leak.get("volumes", ()))]
        return {volume["id"]: volume["split"] for volume in left}, leaks
    sides: dict[str, split.Side] = {volume["patient"]: split.side_of(volume["patient"], *rule) for volume in left}
    resolved, leaks = split.resolve_leaks([(v["id"], v["patient"], v["digest"]) for v in left], sides)
    return dict(resolved), list(leaks)


def _purge(
    folder: OutputFolder, plan: _Plan, rejected: Sequence[dict[str, Any]], sources: Sequence[dict[str, Any]]
) -> None:
    """Delete what the committed set (or no set) has no more, and every line that names what was removed."""
    marks = sorted(withdrawn(folder).marks | {mark_of_withdrawn(name) for name in (plan.pseudonym, *plan.kept_out)})
    _replace(folder.private / WITHDRAWN_NAME, row_bytes([{"sha256": mark} for mark in marks], ascii_only=True), 0o600)
    listed = _listed(folder.previous)
    _delete_shards(folder, (name for name in plan.old_shards if name not in listed))
    for digest in plan.manifests:
        (folder.path / EARLIER_FOLDER / f"{digest}.json").unlink(missing_ok=True)
    _purge_index(folder)
    if folder.rejected.exists():
        _replace(folder.rejected, row_bytes(rejected, ascii_only=False), 0o644)
    labels = folder.path / LABELS_FOLDER
    for path in sorted(labels.glob("*.jsonl")):
        _purge_labels(path, plan)
    if folder.sources.exists():
        _replace(folder.sources, row_bytes(sources, ascii_only=True), 0o600)
    for place in (folder.path, folder.private, folder.path / EARLIER_FOLDER, labels):
        for leftover in place.glob(".*.tmp"):
            leftover.unlink()
        if place.is_dir():
            fsync_folder(place)


def _replace(path: Path, data: bytes, mode: int) -> None:
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)
        path.chmod(mode)


def _purge_index(folder: OutputFolder) -> None:
    """The index of the committed set, or none: killed between manifest.json and it, the old one is still there."""
    path = folder.path / INDEX_NAME
    if folder.previous is None:
        path.unlink(missing_ok=True)
    elif not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != folder.previous["index_sha256"]:
        write_set(folder.path, *complete_set(folder.path, folder.previous))


def _purge_labels(path: Path, plan: _Plan) -> None:
    """Drop the marks on the series; lines of others stay as they are, byte for byte."""
    with path.open("rb") as lines:
        if not any(_is_mark_on(line, plan.series) for line in lines):
            return
    with path.open("rb") as lines, atomic_file(path) as file:
        file.writelines(line for line in lines if not _is_mark_on(line, plan.series))


def _is_mark_on(line: bytes, series: Sequence[str]) -> bool:
    try:
        mark = json.loads(line)
    except ValueError:  # damaged: kept, unless it names what is removed
        return any(name.encode() in line for name in series)
    return isinstance(mark, dict) and mark.get("series") in series


def _delete_shards(folder: OutputFolder, names: Iterable[str]) -> None:
    for name in list(names):
        (folder.path / name).unlink(missing_ok=True)


def _drop_interrupted_pack(folder: OutputFolder) -> None:
    """Shards that a killed pack had finished, and its journal, may hold the patient: that pack begins anew."""
    listed = _listed(folder.previous)
    _delete_shards(folder, (name for name in _on_disk(folder, 0) if name not in listed))
    folder.journal.unlink(missing_ok=True)


def _on_disk(folder: OutputFolder, first: int) -> list[str]:
    """Names of the shards in the folder, listed or not, from number `first` on."""
    matches = (_SHARD.fullmatch(path.name) for path in folder.path.iterdir())
    return sorted(match.group() for match in matches if match and int(match.group(1)) >= first)


def _removal(folder: OutputFolder, plan: _Plan, written: tuple[str, ...]) -> Removal:
    before = (folder.previous or {}).get("removed") or {"manifests": []}
    return Removal(
        pseudonym=plan.pseudonym,
        series=len(plan.series),
        volumes=len(plan.volumes),
        rewritten=written,
        deleted=tuple(plan.old_shards),
        manifests=tuple(sorted({*plan.manifests, *before["manifests"]})),
        emptied=plan.emptied,
        named_in=tuple(_named_in(folder, plan)),
        foreign_files=any("series" not in row for row in folder.read_rows(folder.sources)),
    )


def _named_in(folder: OutputFolder, plan: _Plan) -> Iterator[str]:
    """Files that packing did not write whose name or bytes hold a pseudonym of the plan."""
    own = {folder.path / MANIFEST_NAME, folder.rejected, folder.sources, folder.private / JOURNAL_NAME}
    own.update((folder.path / EARLIER_FOLDER).glob("*.json"))
    names = [name.encode() for name in {plan.pseudonym, *plan.series}]
    for path in sorted(folder.path.rglob("*")):
        if not path.is_file() or path in own or _SHARD.fullmatch(path.name):
            continue
        told = str(path.relative_to(folder.path))
        small = path.stat().st_size <= _SEARCH_BYTES
        if any(name in told.encode() or (small and name in path.read_bytes()) for name in names):
            yield told
