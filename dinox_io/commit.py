"""The end of a pack and of a merge: from new shards and new rows to a committed set.

Invariant: sides and leaks are those of the whole set, as if all of it had been packed at once.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinox_io import split
from dinox_io.canonical import canonical_json
from dinox_io.manifest import build_manifest
from dinox_io.output import OutputFolder, row_bytes
from dinox_io.report import Row, merge_rejected, merge_sources, rejected_by_code
from dinox_io.shard import PACKER, ShardSummary


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """What there is to say of the input."""

    sources: Sequence[Row]
    """For private/sources.jsonl."""
    rejected: Sequence[Row]
    """For rejected.jsonl."""
    seen: set[str]
    """Pseudonyms of its series: what was said of them before is replaced."""


def commit(
    folder: OutputFolder, options: Mapping[str, Any], summaries: Sequence[ShardSummary], new: NewRows, *,
    about: Mapping[str, Any] | None, files: Mapping[Path, bytes] | None = None, remove: Sequence[str] = (),
) -> tuple[dict[str, Any] | None, list[Row]]:  # fmt: skip
    """Commit the set that the folder has, grown by some shards; returns its manifest (None: no volume) and all rows.

    Args:
        options: of the pack, as the manifest records them; the fractions and seed of the split are among them. Where
            no shard is new, those of the manifest before stay, and so do sides and leaks.
        about, files, remove: see build_manifest and OutputFolder.commit.
    """
    before = folder.previous or {"volumes": []}
    packed = {volume["series"] for volume in before["volumes"]}
    sources = merge_sources(folder.read_rows(folder.sources), new.sources, packed)
    rejected = merge_rejected(folder.read_rows(folder.rejected), new.rejected, sources, new.seen)
    volumes = [(v["id"], v["patient"], v["digest"]) for v in before["volumes"]]
    volumes += [(v.id, v.patient, v.digest) for summary in summaries for v in summary.volumes]
    manifest = None
    if volumes:
        if summaries:
            digest = config_digest(options)
            sides, leaks = _sides(options, volumes)
        else:  # These options made none of its volumes.
            options, digest, leaks = before["options"], before["config_digest"], before["leaks"]
            sides = {volume["id"]: volume["split"] for volume in before["volumes"]}
        sizes = [size for row in sources for _, size in row["files"]]
        manifest = build_manifest(
            summaries,
            sides=sides,
            options=dict(options),
            rejected_by_code=rejected_by_code(rejected),
            config_digest=digest,
            leaks=leaks,
            packer=PACKER,
            sources={"files": len(sizes), "bytes": sum(sizes)},
            previous=folder.previous,
            about=about,
        )
    written = {
        **(files or {}),
        folder.sources: row_bytes(sources, ascii_only=True),
        folder.rejected: row_bytes(rejected, ascii_only=False),
    }
    return folder.commit(manifest, written, remove=remove), rejected


def config_digest(options: Mapping[str, Any]) -> str:
    """sha256 of the options as canonical JSON: stands in every shard."""
    return hashlib.sha256(canonical_json(dict(options))).hexdigest()


def _sides(
    options: Mapping[str, Any], volumes: Sequence[tuple[str, str, str]]
) -> tuple[dict[str, split.Side], list[dict[str, object]]]:
    sides: dict[str, split.Side] = {
        patient: split.side_of(patient, options["split_seed"], options["val_fraction"], options["test_fraction"])
        for _, patient, _ in volumes
    }
    return split.resolve_leaks(volumes, sides)
