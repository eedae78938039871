"""A shard again, without some of its volumes: what is left when a patient withdraws.

Invariant: the members that stay are byte for byte what they were, and each has been checked against the manifest, down
to the pixels: damage is never carried over into a shard whose digest would then vouch for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io import hounsfield
from dinox_io.canonical import parse_json_object
from dinox_io.codec import SliceDecoder
from dinox_io.errors import ShardError
from dinox_io.seekable import seek_table_bytes
from dinox_io.shard import (
    BLOCK,
    EncodedVolume,
    ShardEntry,
    ShardReader,
    ShardSummary,
    ShardWriter,
    read_shard_index,
)
from dinox_io.storage import ShardFile, read_bytes


def rewrite_shard(
    file: ShardFile, shard: Mapping[str, Any], path: Path, without: set[str], digests: Mapping[str, str]
) -> ShardSummary:
    """Write the shard that the manifest describes as `shard` again, to `path`, without some volumes (ids).

    Args:
        digests: volume id -> sha256 of its pixels, of all that stay.

    Raises:
        ShardError: anything in it is not what was packed; nothing is written then. OSError: the disk is full, say.
    """
    entries = read_shard_index(file, shard["size"])
    listed = [(member["id"], member["meta_sha256"], member["seek_table_sha256"]) for member in shard["volumes"]]
    if [(entry.meta.id, entry.meta_sha256, entry.seek_table_sha256) for entry in entries] != listed:
        raise ShardError("differs from the manifest", file=file.name)
    with ShardWriter(path, config_digest=_config_digest(file, shard["size"])) as writer:
        for entry in entries:
            if entry.meta.id not in without:
                writer.add(_encoded(file, entry, digests[entry.meta.id]))
        return writer.finish()


def _config_digest(file: ShardFile, size: int) -> str:
    reader = ShardReader(file, size)
    reader.read_head()
    head = read_bytes(file, BLOCK, reader.position).rstrip(b"\0")
    return str(parse_json_object(head, file.name).get("config_digest"))


def _encoded(file: ShardFile, entry: ShardEntry, digest: str) -> EncodedVolume:
    """A volume as its shard holds it. ShardError if its pixels are not those of `digest`."""
    meta_start = entry.offset + BLOCK
    body_end = entry.body_offset + _body_bytes(entry)
    body = read_bytes(file, entry.body_offset, body_end)
    decoder, hashed = SliceDecoder(entry.meta.filter), hashlib.sha256()
    hu = np.empty(entry.meta.shape[1:], np.int16)
    histogram, offset = np.zeros(hounsfield.HISTOGRAM_BINS, np.int64), 0
    for z, (length, _, checksum) in enumerate(entry.frames.tolist()):
        try:
            decoder.decode_into(memoryview(body)[offset : offset + length], hu, checksum)
        except ShardError as error:
            raise error.at(file=file.name, volume=entry.meta.id, slice_index=z) from None
        hashed.update(hu.astype("<i2", copy=False).data)
        histogram += hounsfield.histogram(hu)
        offset += length
    if hashed.hexdigest() != digest:
        raise ShardError("its pixels are not those that were packed", file=file.name, volume=entry.meta.id)
    return EncodedVolume(
        id=entry.meta.id,
        patient=entry.meta.patient,
        series=entry.meta.series,
        shape=entry.meta.shape,
        spacing_mm=entry.meta.spacing_mm,
        digest=digest,
        meta=read_bytes(file, meta_start, meta_start + entry.meta_bytes),
        body=body,
        histogram=histogram,
    )


def _body_bytes(entry: ShardEntry) -> int:
    return int(entry.frames["compressed"].sum(dtype=np.int64)) + seek_table_bytes(entry.meta.shape[0])
