"""The index of a set: where every slice of every volume lies, as arrays (16 bytes a slice), never trusted.

Invariant: an index that is used has been checked against the manifest and the sizes of the shards, so that no offset
or size in it can lead a reader outside a shard or make it allocate more than a slice needs.
The order of volumes is that of the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import msgpack
import numpy as np

from dinox_io.codec import FILTERS, MAX_SLICE_VALUES
from dinox_io.errors import ShardError
from dinox_io.seekable import seek_table_bytes
from dinox_io.shard import BLOCK, END_BYTES, ShardEntry, read_shard_index
from dinox_io.storage import ShardFile, ShardFolder, each

INDEX_NAME = "index.msgpack"
_ENVELOPE_BYTES = 1 << 12
INDEX_FORMAT, INDEX_VERSION = "dinox-index", 1

# Column: little-endian dtype, values a row. The first eight have a row a volume, the others a row a slice.
_COLUMNS = {
    "shard": ("<u4", 1),
    "meta_offset": ("<u8", 1),
    "meta_bytes": ("<u8", 1),
    "body_offset": ("<u8", 1),
    "shape": ("<u4", 3),
    "filter": ("u1", 1),
    "spacing_mm": ("<f8", 3),
    "orientation": ("<f8", 9),
    "frame_bytes": ("<u4", 1),
    "checksum": ("<u4", 1),
    "z_mm": ("<f8", 1),
}
_SLICE_COLUMNS = ("frame_bytes", "checksum", "z_mm")


class SetIndex:
    """v volumes and n slices in columns; the slices of volume i are [first[i], first[i + 1]).

    shard (v,): which of the manifest's shards · meta_offset, meta_bytes (v,): tar header of KEY.json, and its size ·
    body_offset (v,): first frame · shape (v, 3): z y x · filter (v,): which of FILTERS · spacing_mm (v, 3) ·
    orientation (v, 9) · frame_bytes, checksum, z_mm (n,).
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self.shard, self.filter = columns["shard"], columns["filter"]
        self.meta_offset, self.meta_bytes = columns["meta_offset"], columns["meta_bytes"]
        self.body_offset, self.shape = columns["body_offset"], columns["shape"]
        self.spacing_mm, self.orientation = columns["spacing_mm"], columns["orientation"]
        self.frame_bytes, self.checksum, self.z_mm = (columns[name] for name in _SLICE_COLUMNS)
        self.first = np.concatenate([[0], np.cumsum(self.shape[:, 0], dtype=np.int64)])

    def frames(self, volume: int, start: int, stop: int) -> list[int]:
        """Where frames start … stop - 1 of a volume begin in its shard, and where the last ends: stop - start + 1.

        Summed up here, not kept: 8 bytes a slice would be half of the index again.
        """
        first = int(self.first[volume])
        begin = int(self.body_offset[volume]) + int(self.frame_bytes[first : first + start].sum(dtype=np.int64))
        return list(accumulate(self.frame_bytes[first + start : first + stop].tolist(), initial=begin))

    def body_end(self) -> np.ndarray:
        """int64 (v,): first byte behind the last frame of each volume, where its seek table begins."""
        sums = np.add.reduceat(self.frame_bytes.astype(np.int64), self.first[:-1])
        return self.body_offset.astype(np.int64) + sums


def encode_index(index: SetIndex) -> bytes:
    """index.msgpack: {format, version, columns: {name: little-endian bytes}}."""
    columns = {name: getattr(index, name).astype(dtype).tobytes() for name, (dtype, _) in _COLUMNS.items()}
    data = msgpack.packb({"format": INDEX_FORMAT, "version": INDEX_VERSION, "columns": columns})
    assert data is not None
    return data


def load_index(folder: ShardFolder, manifest: Mapping[str, Any]) -> SetIndex:
    """index.msgpack, if it is the one that the manifest names and makes sense; else ShardError."""
    try:
        data = folder.read(INDEX_NAME, _most_bytes(manifest))
    except OSError as error:
        raise ShardError(f"cannot be read ({error.strerror})", file=INDEX_NAME) from None
    if hashlib.sha256(data).hexdigest() != manifest["index_sha256"]:
        raise ShardError("is not the index that the manifest names", file=INDEX_NAME)
    return decode_index(data, manifest)


def _most_bytes(manifest: Mapping[str, Any]) -> int:
    """How large the index of these volumes can be: what else lies there is not read into memory."""
    row_bytes = {name: np.dtype(dtype).itemsize * width for name, (dtype, width) in _COLUMNS.items()}
    slice_bytes = sum(row_bytes[name] for name in _SLICE_COLUMNS)
    volume_bytes = sum(row_bytes.values()) - slice_bytes
    slices = sum(volume["shape"][0] for volume in manifest["volumes"])
    return _ENVELOPE_BYTES + volume_bytes * len(manifest["volumes"]) + slice_bytes * slices


def decode_index(data: bytes, manifest: Mapping[str, Any]) -> SetIndex:
    """The index, if it is well formed and fits the manifest; ShardError otherwise."""
    try:
        document = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ShardError(f"is not an index ({type(error).__name__})", file=INDEX_NAME) from None
    if not isinstance(document, dict) or [document.get("format"), document.get("version")] != [
        INDEX_FORMAT,
        INDEX_VERSION,
    ]:
        raise ShardError("is not an index of this version", file=INDEX_NAME)
    raw = document.get("columns")
    if not isinstance(raw, dict):
        raise ShardError("has no columns", file=INDEX_NAME)
    columns = {name: _column(raw.get(name), name, dtype, width) for name, (dtype, width) in _COLUMNS.items()}
    _check_columns(columns, manifest)
    index = SetIndex(columns)
    _check_extents(index, manifest)
    return index


def _column(data: object, name: str, dtype: str, width: int) -> np.ndarray:
    row_bytes = np.dtype(dtype).itemsize * width
    if not isinstance(data, bytes) or len(data) % row_bytes:
        raise ShardError(f"column {name} is missing or torn", file=INDEX_NAME)
    column = np.frombuffer(data, dtype)
    return column.reshape(-1, width) if width > 1 else column


def _check_columns(columns: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> None:
    shape = columns["shape"].astype(np.int64)
    counts = {len(columns[name]) for name in _COLUMNS if name not in _SLICE_COLUMNS}
    slices = {len(columns[name]) for name in _SLICE_COLUMNS}
    listed = np.array([volume["shape"] for volume in manifest["volumes"]], np.int64).reshape(-1, 3)
    if counts != {len(manifest["volumes"])} or slices != {int(shape[:, 0].sum())} or not np.array_equal(shape, listed):
        raise ShardError("has other volumes than the manifest", file=INDEX_NAME)
    if np.any(shape < 1) or np.any(shape[:, 1] * shape[:, 2] > MAX_SLICE_VALUES):
        raise ShardError("has impossible shapes", file=INDEX_NAME)
    if np.any(columns["shard"] >= len(manifest["shards"])) or np.any(columns["filter"] >= len(FILTERS)):
        raise ShardError("names a shard or a filter that does not exist", file=INDEX_NAME)


def _check_extents(index: SetIndex, manifest: Mapping[str, Any]) -> None:
    """Each volume's members lie inside its shard, behind each other."""
    size = np.array([shard["size"] for shard in manifest["shards"]], np.int64)[index.shard]
    # Sums in floating point first: hostile 64-bit values would wrap.
    meta_end = index.meta_offset.astype(np.float64) + BLOCK + index.meta_bytes
    body_end = index.body_offset.astype(np.float64) + np.add.reduceat(
        index.frame_bytes.astype(np.float64), index.first[:-1]
    )
    behind = body_end + [seek_table_bytes(int(count)) for count in index.shape[:, 0]]
    inside = (meta_end + BLOCK <= index.body_offset) & (behind + END_BYTES <= size) & (index.meta_bytes > 0)
    if not inside.all() or np.any(index.frame_bytes == 0):
        raise ShardError("points outside a shard", file=INDEX_NAME)


# --- from the shards themselves ----------------------------------------------------------------------------------


def rebuild_index(files: Sequence[ShardFile], manifest: Mapping[str, Any], *, in_flight: int = 1) -> SetIndex:
    """The index from tar headers, KEY.json and seek tables, all checked against the manifest. ShardError.

    in_flight: shards that are read at once.
    """
    found: dict[str, tuple[int, ShardEntry]] = {}
    sizes = [shard["size"] for shard in manifest["shards"]]
    indices = each(lambda number: read_shard_index(files[number], sizes[number]), range(len(files)), in_flight)
    for number, (file, shard, entries) in enumerate(zip(files, manifest["shards"], indices, strict=True)):
        listed = [(volume["id"], volume["meta_sha256"], volume["seek_table_sha256"]) for volume in shard["volumes"]]
        for entry, expected in zip(entries, listed, strict=False):
            if (entry.meta.id, entry.meta_sha256, entry.seek_table_sha256) != expected:
                raise ShardError("differs from the manifest", file=file.name, volume=entry.meta.id)
            found[entry.meta.id] = number, entry
        if len(entries) != len(listed):
            raise ShardError(f"has {len(entries)} volumes where the manifest lists {len(listed)}", file=file.name)
    ordered = [found[volume["id"]] for volume in manifest["volumes"]]
    for volume, (number, entry) in zip(manifest["volumes"], ordered, strict=True):
        _check_record(volume, entry, files[number].name)
    return SetIndex(_columns_of(ordered))


def _check_record(volume: Mapping[str, Any], entry: ShardEntry, file_name: str) -> None:
    meta = entry.meta
    told = (meta.patient, meta.series, meta.digest, list(meta.shape), list(meta.spacing_mm))
    if told != tuple(volume[name] for name in ("patient", "series", "digest", "shape", "spacing_mm")):
        raise ShardError("KEY.json and manifest differ", file=file_name, volume=meta.id)


def _columns_of(ordered: Sequence[tuple[int, ShardEntry]]) -> dict[str, np.ndarray]:
    entries = [entry for _, entry in ordered]
    frames = np.concatenate([entry.frames for entry in entries])
    rows: dict[str, Any] = {
        "shard": [number for number, _ in ordered],
        "meta_offset": [entry.offset for entry in entries],
        "meta_bytes": [entry.meta_bytes for entry in entries],
        "body_offset": [entry.body_offset for entry in entries],
        "shape": [entry.meta.shape for entry in entries],
        "filter": [FILTERS.index(entry.meta.filter) for entry in entries],
        "spacing_mm": [entry.meta.spacing_mm for entry in entries],
        "orientation": [entry.meta.orientation for entry in entries],
        "frame_bytes": frames["compressed"],
        "checksum": frames["checksum"],
        "z_mm": np.concatenate([entry.meta.z_positions_mm for entry in entries]),
    }
    return {name: np.ascontiguousarray(rows[name], dtype) for name, (dtype, _) in _COLUMNS.items()}
