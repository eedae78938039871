"""Verifying a set: every byte read and hashed, every slice decoded, every damaged volume named.

Invariant: reading never stops at the first damage. What cannot be reached behind it is named too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.codec import SliceDecoder
from dinox_io.errors import ShardError
from dinox_io.index import SetIndex, load_index
from dinox_io.manifest import EARLIER_FOLDER, MANIFEST_NAME, manifest_in, set_folder
from dinox_io.shard import END_BYTES, ShardEntry, ShardReader
from dinox_io.storage import ShardFile, ShardFolder, read_bytes

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was packed. `volume` is None where no volume is touched."""

    file: str
    volume: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: " + (f"volume {self.volume}: " if self.volume else "") + self.problem


def is_set_folder(folder: Path) -> bool:
    """Whether a folder holds anything of a set, damaged or not: a manifest, an earlier one, an index or a shard."""
    names = (MANIFEST_NAME, EARLIER_FOLDER, "index.msgpack")
    return any((folder / name).exists() for name in names) or any(folder.glob("shard-*.tar"))


def verify_set(
    path: str | Path, *, threads: int = 1, progress: Callable[[str, int], None] | None = None
) -> list[Damage]:
    """Read and hash every byte of the set in a folder; an empty list if it is whole.

    Args:
        path: the folder of a set, as for open_shards. threads: shards that are read at once.
        progress: called with the name and the bytes of each shard that is done.
    """
    try:
        folder, name = set_folder(path)
        manifest = manifest_in(folder, name)
    except ShardError as error:
        return [_damage(error, "manifest.json", None)]
    earlier = name.startswith(EARLIER_FOLDER)
    return verify_manifest(folder, manifest, earlier=earlier, threads=threads, progress=progress)


def verify_manifest(
    folder: ShardFolder,
    manifest: dict[str, Any],
    *,
    earlier: bool = False,
    threads: int = 1,
    progress: Callable[[str, int], None] | None = None,
) -> list[Damage]:
    """`verify_set` of a manifest that was read already. `earlier`: it is one of manifests/, which have no index."""
    damages: list[Damage] = []
    index = None
    try:
        index = load_index(folder, manifest)
    except ShardError as error:
        if not earlier:
            damages.append(_damage(error, "index.msgpack", None, "; packing into the folder again writes it anew"))
    for old in folder.names(EARLIER_FOLDER):
        try:
            if old.endswith(".json"):
                manifest_in(folder, old)
        except ShardError as error:
            damages.append(_damage(error, old, None))

    def verify(number: int) -> list[Damage]:
        shard = manifest["shards"][number]
        found = _verify_shard(folder, shard, _expected(manifest, number, index))
        if progress:
            progress(shard["name"], shard["size"])
        return found

    pool = ThreadPoolExecutor(threads)
    try:
        for found in pool.map(verify, range(len(manifest["shards"]))):
            damages.extend(found)
    except BaseException:  # Ctrl-C must not wait until shards of many GB are read
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return damages


@dataclass(frozen=True)
class _Expected:
    """A volume as the manifest has it; `offset` is where the index says it begins, if there is one."""

    id: str
    digest: str
    meta_sha256: str
    seek_table_sha256: str
    offset: int | None


def _expected(manifest: dict[str, Any], number: int, index: SetIndex | None) -> list[_Expected]:
    """The volumes of shard `number`, in their order there."""
    rows = {volume["id"]: row for row, volume in enumerate(manifest["volumes"])}
    return [
        _Expected(
            id=member["id"],
            digest=manifest["volumes"][rows[member["id"]]]["digest"],
            meta_sha256=member["meta_sha256"],
            seek_table_sha256=member["seek_table_sha256"],
            offset=None if index is None else int(index.meta_offset[rows[member["id"]]]),
        )
        for member in manifest["shards"][number]["volumes"]
    ]


def _verify_shard(folder: ShardFolder, shard: dict[str, Any], expected: list[_Expected]) -> list[Damage]:
    try:
        file = folder.open(shard["name"])
    except ShardError as error:
        return [_damage(error, shard["name"], volume.id) for volume in expected]
    try:
        damages = _verify_volumes(file, shard["size"], expected)
        if not damages:
            return _verify_bytes(file, shard)
        if file.size != shard["size"]:  # a second damage: that of the volumes may be another one
            damages.append(Damage(file=file.name, volume=None, problem=_size_problem(file, shard)))
        return damages
    finally:
        file.close()


def _verify_volumes(file: ShardFile, size: int, expected: list[_Expected]) -> list[Damage]:
    reader = ShardReader(file, min(file.size, size - END_BYTES))
    damages: list[Damage] = []
    lost: ShardError | None = None
    try:
        reader.read_head()
    except ShardError as error:
        lost = error
        damages.append(_damage(error, file.name, None))
    for volume in expected:
        if volume.offset is not None:
            reader.position, lost = volume.offset, None
        if lost is not None:
            damages.append(_damage(lost, file.name, volume.id, "; what stands behind that cannot be found"))
            continue
        try:
            entry = reader.next_volume()
        except ShardError as error:
            lost = error
            damages.append(_damage(error, file.name, volume.id))
            continue
        try:
            _verify_volume(file, entry, volume)
        except ShardError as error:
            damages.append(_damage(error, file.name, volume.id))
    return damages


def _verify_bytes(file: ShardFile, shard: dict[str, Any]) -> list[Damage]:
    """What stands outside of volumes (headers, padding) is covered by the digest of the whole file only."""
    try:
        if file.size == shard["size"] and _sha256(file) == shard["sha256"]:
            return []
    except ShardError as error:
        return [_damage(error, file.name, None)]
    size = _size_problem(file, shard) if file.size != shard["size"] else "same size"
    return [Damage(file=file.name, volume=None, problem=f"its bytes are not those that were packed ({size})")]


def _size_problem(file: ShardFile, shard: dict[str, Any]) -> str:
    return f"it has {file.size} bytes instead of {shard['size']}"


def _verify_volume(file: ShardFile, entry: ShardEntry, expected: _Expected) -> None:
    if entry.meta.id != expected.id:
        raise ShardError(f"volume {entry.meta.id} stands in its place")
    if entry.meta_sha256 != expected.meta_sha256 or entry.seek_table_sha256 != expected.seek_table_sha256:
        raise ShardError("its KEY.json or its seek table is not the one that was packed")
    decoder, digest = SliceDecoder(entry.meta.filter), hashlib.sha256()
    out = np.empty(entry.meta.shape[1:], np.int16)
    offset = entry.body_offset
    for z, (length, _, checksum) in enumerate(entry.frames.tolist()):
        try:
            decoder.decode_into(read_bytes(file, offset, offset + length), out, checksum)
        except ShardError as error:
            raise error.at(slice_index=z) from None
        digest.update(out.astype("<i2", copy=False).data)
        offset += length
    if digest.hexdigest() != expected.digest:
        raise ShardError("its pixels do not have the digest of the volume that was packed")


def _sha256(file: ShardFile) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    for start in range(0, file.size, _CHUNK_BYTES):
        chunk = buffer[: min(_CHUNK_BYTES, file.size - start)]
        file.read_into(start, chunk)
        digest.update(chunk)
    return digest.hexdigest()


def _damage(error: ShardError, file: str, volume: str | None, more: str = "") -> Damage:
    problem = str(error).removeprefix(f"{file}: ").removeprefix(f"volume {volume}: ")
    return Damage(file=file, volume=volume, problem=problem + more)
