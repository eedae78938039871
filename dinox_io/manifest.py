"""The manifest: root of trust of a set. It lists shards and volumes with their digests and ends with its own.

    build_manifest (pure) -> commit_set: manifests/DIGEST.json (the one before), manifest.json, index.msgpack

Invariant: `self` is the sha256 of the other members as canonical JSON; no timestamps, so that the same set has the
same manifest. A manifest that was ever committed stays readable: a run resumes on the one that it began with.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from dinox_io import hounsfield
from dinox_io.about import is_about
from dinox_io.atomic import write_atomically
from dinox_io.canonical import canonical_json, parse_json_object
from dinox_io.cloud import BucketFolder, is_address
from dinox_io.errors import ShardError
from dinox_io.index import INDEX_NAME, encode_index, rebuild_index
from dinox_io.record import ID_PATTERN
from dinox_io.shard import NAME_PATTERN, ShardSummary, VolumeSummary
from dinox_io.storage import LocalFile, LocalFolder, ShardFolder
from dinox_io.versions import tool_versions

MANIFEST_NAME, EARLIER_FOLDER = "manifest.json", "manifests"
SET_FORMAT, SET_VERSION = "dinox-set", 1
SIDES = ("train", "val", "test", "none")
MAX_MANIFEST_BYTES = 1 << 28  # some 400,000 volumes

# What only the commit knows, or what only says where the set came from: not part of "is anything new".
_COMMIT_KEYS = ("self", "index_sha256", "previous")
# What a manifest says that was written before these members were known.
_UNSAID: Mapping[str, Any] = {"tools": {}, "about": None, "removed": None}


# --- building ----------------------------------------------------------------------------------------------------


def build_manifest(
    summaries: Sequence[ShardSummary],
    *,
    sides: Mapping[str, str],
    options: dict[str, Any],
    rejected_by_code: Mapping[str, int],
    config_digest: str,
    leaks: list[Any],
    packer: str,
    sources: Mapping[str, int],
    previous: dict[str, Any] | None,
    about: Mapping[str, Any] | None = None,
    dropped: Collection[str] = (),
    removed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A manifest without `index_sha256` and `self`, which `commit_set` adds (it returns the whole one).

    Args:
        summaries: the shards that are new. Those of `previous` are carried over, but for any of the same name.
        sides: volume id -> "train" | "val" | "test" | "none", for every volume, old and new.
        options, rejected_by_code, leaks, sources: JSON values, recorded as they are.
        previous: the manifest (as read_manifest gives it) that this one follows, or None for a new set.
        about: what read_about gives; None keeps what `previous` has.
        dropped: names of shards of `previous` that this manifest has no more (a patient was removed).
        removed: {"volumes", "manifests"} as remove.py counts them; None keeps what `previous` has.

    `packer` and `tools` are those of the last addition: where no shard is new, they stay as `previous` has them.

    Raises:
        ValueError: a volume stands twice, has no side, or there is no volume at all.
    """
    shards, volumes = _carried_over(previous, {summary.name for summary in summaries} | set(dropped))
    before = previous or {}
    added = bool(summaries) and not dropped
    for summary in summaries:
        shards.append(_shard_record(summary))
        volumes.extend(_volume_record(volume) for volume in summary.volumes)
    twice = [id for id, count in Counter(volume["id"] for volume in volumes).items() if count > 1]
    if twice or not volumes:
        raise ValueError(f"volume {twice[0]} stands in two shards" if twice else "a set needs at least one volume")
    for volume in volumes:
        side = sides.get(volume["id"])
        if side not in SIDES:
            raise ValueError(f"volume {volume['id']} has the side {side!r}, not one of {', '.join(SIDES)}")
        volume["split"] = side
    shards.sort(key=lambda shard: shard["name"])
    volumes.sort(key=lambda volume: volume["id"])
    manifest = {
        "format": SET_FORMAT,
        "version": SET_VERSION,
        "encoding": hounsfield.ENCODING,
        "packer": packer if added else before.get("packer", packer),
        "tools": tool_versions() if added else before.get("tools", {}),
        "about": before.get("about") if about is None else dict(about),
        "config_digest": config_digest,
        "options": options,
        "sources": dict(sources),
        "previous": previous["self"] if previous else None,
        "rejected": dict(rejected_by_code),
        "leaks": leaks,
        "removed": before.get("removed") if removed is None else dict(removed),
        "shards": shards,
        "volumes": volumes,
        **_statistics(shards, volumes),
    }
    told = {**_UNSAID, **(previous or {})}
    if previous and all(told.get(key) == value for key, value in manifest.items() if key not in _COMMIT_KEYS):
        # Nothing new: the very manifest that stands there, so that committing it again changes nothing.
        return {key: value for key, value in previous.items() if key not in ("self", "index_sha256")}
    return manifest


def _carried_over(
    previous: dict[str, Any] | None, replaced: set[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if previous is None:
        return [], []
    shards = [shard for shard in previous["shards"] if shard["name"] not in replaced]
    kept = {volume["id"] for shard in shards for volume in shard["volumes"]}
    return shards, [dict(volume) for volume in previous["volumes"] if volume["id"] in kept]


def _shard_record(summary: ShardSummary) -> dict[str, Any]:
    return {
        "name": summary.name,
        "size": summary.size,
        "sha256": summary.sha256,
        "hu_histogram": sparse_histogram(summary.histogram),
        "volumes": [
            {"id": volume.id, "meta_sha256": volume.meta_sha256, "seek_table_sha256": volume.seek_table_sha256}
            for volume in summary.volumes
        ],
    }


def _volume_record(volume: VolumeSummary) -> dict[str, Any]:
    return {
        "id": volume.id,
        "patient": volume.patient,
        "series": volume.series,
        "digest": volume.digest,
        "shape": list(volume.shape),
        "spacing_mm": list(volume.spacing_mm),
    }


def _statistics(shards: list[dict[str, Any]], volumes: list[dict[str, Any]]) -> dict[str, Any]:
    spacing_mm = np.array([volume["spacing_mm"] for volume in volumes], np.float64)
    histogram = np.sum([dense_histogram(shard["hu_histogram"]) for shard in shards], axis=0)
    return {
        "counts": _counts(volumes) | {"shards": len(shards), "shard_bytes": sum(shard["size"] for shard in shards)},
        "splits": {side: _counts([volume for volume in volumes if volume["split"] == side]) for side in SIDES},
        "spacing_mm": {
            axis: {"min": float(column.min()), "median": float(np.median(column)), "max": float(column.max())}
            for axis, column in zip("zyx", spacing_mm.T, strict=True)
        },
        "hu_histogram": sparse_histogram(histogram),
    }


def _counts(volumes: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "volumes": len(volumes),
        "patients": len({volume["patient"] for volume in volumes}),
        "slices": sum(volume["shape"][0] for volume in volumes),
        "raw_bytes": sum(2 * volume["shape"][0] * volume["shape"][1] * volume["shape"][2] for volume in volumes),
    }


def sparse_histogram(counts: np.ndarray) -> dict[str, Any]:
    """int64 (4096,) -> {first_bin, counts} from the first to the last bin that is not empty."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {"first_bin": 0, "counts": []}
    return {"first_bin": int(filled[0]), "counts": [int(count) for count in counts[filled[0] : filled[-1] + 1]]}


def dense_histogram(sparse: Mapping[str, Any]) -> np.ndarray:
    """{first_bin, counts} -> int64 (4096,). ShardError if it does not fit."""
    dense = np.zeros(hounsfield.HISTOGRAM_BINS, np.int64)
    first, counts = sparse.get("first_bin"), sparse.get("counts")
    if type(first) is not int or not isinstance(counts, list) or not 0 <= first <= len(dense) - len(counts):
        raise ShardError("hu_histogram is malformed", file=MANIFEST_NAME)
    dense[first : first + len(counts)] = counts
    return dense


# --- disk --------------------------------------------------------------------------------------------------------


def commit_set(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Make `manifest` that of the set in `folder`, whose shards are all in place; returns it with `self`.

    `complete_set`, then `write_set`. Raises ShardError, with nothing changed, if the shards are not what it says.
    """
    complete, index = complete_set(Path(folder), manifest)
    write_set(Path(folder), complete, index)
    return complete


def complete_set(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The manifest with `index_sha256` and `self`, and the bytes of its index. Writes nothing.

    Raises ShardError if the shards in `folder` are not what the manifest says.
    """
    index = _index_bytes(folder, manifest)
    complete = {key: value for key, value in manifest.items() if key not in ("self", "index_sha256")}
    complete["index_sha256"] = hashlib.sha256(index).hexdigest()
    complete["self"] = _digest(complete)
    return complete, index


def write_set(folder: Path, complete: dict[str, Any], index: bytes, *, keep_previous: bool = True) -> None:
    """Write what `complete_set` gave.

    In order: the manifest before is kept as manifests/DIGEST.json (unless not `keep_previous`: of what is removed
    nothing may stay), manifest.json takes its place atomically, then index.msgpack. Killed in between, the set is whole
    (the old one or the new). Committing the same set again writes nothing but a missing index.
    """
    (folder / EARLIER_FOLDER).mkdir(exist_ok=True)
    target = folder / MANIFEST_NAME
    before = read_manifest(folder) if target.exists() else None
    if keep_previous and before is not None and before["self"] != complete["self"]:
        write_atomically(folder / EARLIER_FOLDER / f"{before['self']}.json", target.read_bytes())
    if before is None or before["self"] != complete["self"]:
        write_atomically(target, serialize_manifest(complete))
    index_path = folder / INDEX_NAME
    if not index_path.exists() or index_path.read_bytes() != index:
        write_atomically(index_path, index)


def _index_bytes(folder: Path, manifest: dict[str, Any]) -> bytes:
    files: list[LocalFile] = []
    try:
        files.extend(LocalFile(folder / shard["name"]) for shard in manifest["shards"])
        return encode_index(rebuild_index(files, manifest))
    finally:
        for file in files:
            file.close()


def serialize_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json: canonical JSON, but `self` comes last."""
    others = canonical_json({key: value for key, value in manifest.items() if key != "self"})
    return others[:-1] + b',"self":"' + manifest["self"].encode() + b'"}\n'


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json({k: v for k, v in manifest.items() if k != "self"})).hexdigest()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a set (see `set_folder`), checked against its `self`. ShardError."""
    return manifest_in(*set_folder(path))


def manifest_in(folder: ShardFolder, name: str = MANIFEST_NAME) -> dict[str, Any]:
    """The manifest called `name` in the folder of a set, checked against its `self`. ShardError."""
    file_name = name.rpartition("/")[2]
    try:
        data = folder.read(name, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise ShardError(
            f"there is none in {folder}: not a set of shards, or its packing never ended", file=file_name
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path that can be none, or ShardError: too large
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"cannot be read ({getattr(error, 'strerror', None) or error})", file=file_name) from error
    manifest = parse_json_object(data, file_name)
    try:
        digest = _digest(manifest)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"is not JSON as it was written ({error})", file=file_name) from None
    if manifest.get("self") != digest:
        raise ShardError(f"its members have the digest {digest}, it says {manifest.get('self')!r}", file=file_name)
    check_manifest(manifest, file_name)
    return manifest


def set_folder(path: str | Path) -> tuple[ShardFolder, str]:
    """The folder of a set, and the name of its manifest there (manifests/DIGEST.json: an earlier one).

    `path`: that folder or the file of the manifest, in the file system or as s3://BUCKET/PREFIX. ShardError.
    """
    if isinstance(path, str) and is_address(path):
        above, _, last = path.rstrip("/").rpartition("/")
        if not last.endswith(".json"):
            return BucketFolder(path), MANIFEST_NAME
        place, _, folder_name = above.rpartition("/")
        if folder_name == EARLIER_FOLDER:
            return BucketFolder(place), f"{EARLIER_FOLDER}/{last}"
        return BucketFolder(above), last
    path = Path(path)
    try:
        if path.is_dir():
            return LocalFolder(path), MANIFEST_NAME
        if path.parts[:1] == ("s3:",):
            raise ShardError(f"{path}: a Path loses a slash of s3://BUCKET/PREFIX; give it as a string")
    except OSError as error:
        raise ShardError(f"cannot be read ({error.strerror})", file=path.name) from error
    if path.parent.name == EARLIER_FOLDER:
        return LocalFolder(path.parent.parent), f"{EARLIER_FOLDER}/{path.name}"
    return LocalFolder(path.parent), path.name


def check_manifest(manifest: Mapping[str, Any], file_name: str) -> None:
    """Refuse a manifest whose version is unknown or whose members cannot be used; unknown members are ignored."""
    for key, value in (("format", SET_FORMAT), ("version", SET_VERSION)):
        if manifest.get(key) != value or type(manifest.get(key)) is not type(value):
            raise ShardError(f"{key} is {manifest.get(key)!r}, this version reads {value!r}", file=file_name)
    try:
        hounsfield.check_encoding(str(manifest.get("encoding")))
    except ValueError as error:
        raise ShardError(str(error), file=file_name) from None
    shards, volumes = manifest.get("shards"), manifest.get("volumes")
    if not _all_objects(shards) or not _all_objects(volumes):
        raise ShardError("its list of shards or volumes is missing or empty", file=file_name)
    if not all(_all_objects(shard.get("volumes")) for shard in shards):
        raise ShardError("a shard without volumes", file=file_name)
    members = [member for shard in shards for member in shard["volumes"]]
    if not all(map(_is_shard, shards)) or not all(map(_is_volume, volumes)) or not all(map(_is_member, members)):
        raise ShardError("a shard or a volume is not described as the format says", file=file_name)
    ids = [volume["id"] for volume in volumes]
    if len({shard["name"] for shard in shards}) != len(shards) or len(set(ids)) != len(ids):
        raise ShardError("a shard or a volume stands twice", file=file_name)
    if sorted(member["id"] for member in members) != sorted(ids):
        raise ShardError("its shards hold other volumes than it lists", file=file_name)
    if not _is_digest(manifest.get("index_sha256")):
        raise ShardError("index_sha256 is missing or malformed", file=file_name)
    if not is_about(manifest.get("about")):
        raise ShardError("about is not what describes a data set", file=file_name)
    if not _is_removed(manifest.get("removed")):
        raise ShardError("removed is malformed", file=file_name)


def _all_objects(values: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(values, list) and len(values) > 0 and all(isinstance(value, dict) for value in values)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and value.isascii() and value.isalnum()


def _is_removed(value: object) -> bool:
    if value is None:
        return True
    manifests = value.get("manifests") if isinstance(value, dict) else None
    return (
        isinstance(value, dict)
        and type(value.get("volumes")) is int
        and isinstance(manifests, list)
        and all(map(_is_digest, manifests))
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME_PATTERN.fullmatch(value) is not None


def _is_id(value: object) -> bool:
    return isinstance(value, str) and ID_PATTERN.fullmatch(value) is not None


def _is_shard(shard: dict[str, Any]) -> bool:
    size = shard.get("size")
    return _is_name(shard.get("name")) and _is_digest(shard.get("sha256")) and type(size) is int and 0 < size < 1 << 62


def _is_member(member: dict[str, Any]) -> bool:
    return _is_id(member.get("id")) and all(_is_digest(member.get(k)) for k in ("meta_sha256", "seek_table_sha256"))


def _is_volume(volume: dict[str, Any]) -> bool:
    shape, spacing_mm = volume.get("shape"), volume.get("spacing_mm")
    return (
        all(_is_id(volume.get(key)) for key in ("id", "patient", "series"))
        and _is_digest(volume.get("digest"))
        and volume.get("split") in SIDES
        and isinstance(shape, list)
        and len(shape) == 3
        and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
        and isinstance(spacing_mm, list)
        and len(spacing_mm) == 3
        and all(type(size) in (int, float) for size in spacing_mm)
    )
