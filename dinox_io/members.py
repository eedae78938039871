"""The small members of a set's shards (heads, KEY.json, seek tables), compared with its manifest and its index.

Invariant: each is looked at once, and what lies together is one read: a seek table ends where the next volume's
KEY.json begins, so v volumes in s shards take v + s reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinox_io.codec import FILTERS
from dinox_io.errors import ShardError
from dinox_io.index import INDEX_NAME, SetIndex
from dinox_io.record import parse_meta
from dinox_io.seekable import frames_of_table, seek_table_bytes
from dinox_io.shard import BLOCK, END_BYTES, ShardReader
from dinox_io.storage import ShardFile, each, read_bytes

NEAR_BYTES = 4 * BLOCK
"""Members that are no further apart are read together …"""
MOST_BYTES = 1 << 20
"""… as long as that is no larger."""
_HEAD_BYTES = 8 * BLOCK
"""That a head has, as a rule."""
HEAD, META, TABLE = "head", "KEY.json", "seek table"


@dataclass(frozen=True)
class _Member:
    """Bytes [start, stop) of a shard. volume: its number in the manifest; of a head, of the shard's first one."""

    kind: str
    volume: int
    start: int
    stop: int


def check_shards(
    files: Sequence[ShardFile],
    manifest: Mapping[str, Any],
    index: SetIndex,
    *,
    numbers: Collection[int] | None = None,
    in_flight: int = 1,
) -> None:
    """Every KEY.json and every seek table where the index says, with the digests of the manifest; else ShardError.

    This is what tells a shard that was swapped or edited without a change of its size. An index that says something
    else than they do is told by the `file` of the error: it alone is wrong.
    numbers: of the shards that are looked at; None: all. in_flight: reads at once.
    """
    listed = {volume["id"]: volume for shard in manifest["shards"] for volume in shard["volumes"]}

    def check(read: tuple[int, list[_Member]]) -> None:
        file, members = files[read[0]], read[1]
        start = members[0].start
        data = read_bytes(file, start, max(member.stop for member in members))
        for member in members:
            piece = data[member.start - start : member.stop - start]
            if member.kind == HEAD:
                # Where it is longer, the rest is read from the shard.
                ShardReader(_Begun(file, piece), file.size - END_BYTES).read_head()
            else:
                _check_member(member, piece, file, manifest, index, listed)

    each(check, list(_reads(index, len(files), numbers)), in_flight)


def _reads(index: SetIndex, shards: int, numbers: Collection[int] | None) -> Iterator[tuple[int, list[_Member]]]:
    """Shard, and members of it that lie together; shard after shard, from each one's beginning."""
    order = np.argsort(index.shard, kind="stable")
    borders = np.searchsorted(index.shard[order], np.arange(shards + 1))
    ends = index.body_end()
    for number in range(shards) if numbers is None else sorted(numbers):
        together: list[_Member] = []
        end = 0
        for member in _members(index, order[borders[number] : borders[number + 1]], ends):
            if together and (member.start - end > NEAR_BYTES or member.stop - together[0].start > MOST_BYTES):
                yield number, together
                together = []
            together.append(member)
            end = max(end, member.stop)
        if together:
            yield number, together


def _members(index: SetIndex, volumes: np.ndarray, ends: np.ndarray) -> list[_Member]:
    """The small members of a shard, as they lie; `volumes` are those in it."""
    if not len(volumes):
        return []
    found = [_Member(HEAD, int(volumes[0]), 0, min(int(index.meta_offset[volumes].min()), _HEAD_BYTES))]
    for volume in volumes.tolist():
        meta = int(index.meta_offset[volume]) + BLOCK
        table, count = int(ends[volume]), int(index.shape[volume, 0])
        found.append(_Member(META, volume, meta, meta + int(index.meta_bytes[volume])))
        found.append(_Member(TABLE, volume, table, table + seek_table_bytes(count)))
    return sorted(found, key=lambda member: member.start)


class _Begun:
    """A shard whose first bytes were read already; a ShardFile."""

    def __init__(self, file: ShardFile, data: bytes) -> None:
        self.name, self.size, self._file, self._data = file.name, file.size, file, data

    def read_into(self, start: int, buffer: memoryview) -> None:
        if start + len(buffer) <= len(self._data):
            buffer[:] = self._data[start : start + len(buffer)]
        else:
            self._file.read_into(start, buffer)

    def close(self) -> None:
        """The file is somebody else's."""


def _check_member(
    member: _Member,
    data: bytes,
    file: ShardFile,
    manifest: Mapping[str, Any],
    index: SetIndex,
    listed: Mapping[str, Mapping[str, Any]],
) -> None:
    volume = manifest["volumes"][member.volume]["id"]
    name = "meta_sha256" if member.kind == META else "seek_table_sha256"
    if hashlib.sha256(data).hexdigest() != listed[volume][name]:
        raise ShardError(f"its {member.kind} is not the one that was packed", file=file.name, volume=volume)
    same = _meta_fits if member.kind == META else _table_fits
    if not same(index, member.volume, data, volume, file.name):
        raise ShardError("is not what the shard says", file=INDEX_NAME, volume=volume)


def _meta_fits(index: SetIndex, number: int, data: bytes, volume: str, file_name: str) -> bool:
    meta, slices = parse_meta(data, volume, file_name), _slices(index, number)
    told = (
        (index.shape[number], meta.shape),
        (index.filter[number], FILTERS.index(meta.filter)),
        (index.spacing_mm[number], meta.spacing_mm),
        (index.orientation[number], meta.orientation),
        (index.z_mm[slices], meta.z_positions_mm),
    )
    return all(np.array_equal(left, right) for left, right in told)


def _table_fits(index: SetIndex, number: int, data: bytes, volume: str, file_name: str) -> bool:
    frames, slices = frames_of_table(data), _slices(index, number)
    return np.array_equal(index.frame_bytes[slices], frames["compressed"]) and np.array_equal(
        index.checksum[slices], frames["checksum"]
    )


def _slices(index: SetIndex, number: int) -> slice:
    return slice(int(index.first[number]), int(index.first[number + 1]))
