"""Forged sets (F17 to F21), whose digests all fit: ShardError or an ignored index; right pixels, little memory.

Who writes these knows the format and can sign a manifest: only checks of the contents can tell.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard

import dinox_io
from dinox_io.canonical import canonical_json
from dinox_io.codec import checksum32
from dinox_io.index import encode_index
from dinox_io.manifest import build_manifest, serialize_manifest, write_set
from dinox_io.seekable import seek_table
from dinox_io.shard import EncodedVolume, ShardWriter, encode_volume
from dinox_io.volume import Volume
from tests.io.test_manifest import resign
from tests.io.test_shardset import adopt, forged

SHAPE = (3, 12, 16)
SLICE_BYTES = 2 * 12 * 16


def commit(folder: Path, *encoded: EncodedVolume) -> Path:
    """A set of one shard that holds these members as they are; its index is taken from the seek tables."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / "shard-000000.tar", config_digest="c") as writer:
        for volume in encoded:
            writer.add(volume)
        summary = writer.finish()
    manifest = build_manifest(
        [summary], sides={volume.id: "train" for volume in encoded}, options={}, rejected_by_code={},
        config_digest="c", leaks=[], packer="tests", sources={}, previous=None,
    )  # fmt: skip
    write_set(folder, resign(manifest | {"index_sha256": "0" * 64}), b"")
    return folder


def with_frames(volume: EncodedVolume, frames: list[bytes], checksums: list[int] | None = None) -> EncodedVolume:
    """The volume with other zstd frames, which the seek table says to be slices."""
    sums = checksums or [0] * len(frames)
    table = seek_table([(len(frame), SLICE_BYTES, sum32) for frame, sum32 in zip(frames, sums, strict=True)])
    return replace(volume, body=b"".join(frames) + table)


def opened(folder: Path, **options: Any) -> dinox_io.ShardSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dinox_io.open_shards(folder, **options)


# --- zstd --------------------------------------------------------------------------------------------------------

BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(SLICE_BYTES))
# Magic; descriptor: two bytes of content size, not a single segment; a window of 2^41 bytes; a last raw block.
HUGE_WINDOW = b"\x28\xb5\x2f\xfd" + bytes([0x40, 0xF8]) + struct.pack("<H", SLICE_BYTES - 256) + b"\x01\x00\x00"
DICTIONARY = b"\x28\xb5\x2f\xfd" + bytes([0x61, 7]) + struct.pack("<H", SLICE_BYTES - 256) + b"\x01\x00\x00"
CLAIMS_TOO_MUCH = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + struct.pack("<Q", 1 << 62) + b"\x01\x00\x00"
SHORT = b"\x28\xb5\x2f\xfd" + bytes([0x60]) + struct.pack("<H", SLICE_BYTES - 256) + b"\x01\x00\x00"
SKIPPABLE = struct.pack("<II", 0x184D2A50, 1 << 31)
TWO_FRAMES = 2 * zstandard.ZstdCompressor().compress(bytes(SLICE_BYTES // 2))


@pytest.mark.parametrize(
    "frame",
    [BOMB, NO_SIZE, HUGE_WINDOW, DICTIONARY, CLAIMS_TOO_MUCH, SHORT, SKIPPABLE, TWO_FRAMES, b"\x28\xb5\x2f\xfd", b"x"],
    ids=["bomb", "no size", "window", "dictionary", "claims", "short", "skippable", "two", "cut", "none"],
)
@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_forged_frame_is_never_pixels(tmp_path: Path, make_volume, frame: bytes, verify: str) -> None:
    whole = encode_volume(make_volume(1, SHAPE), filter="none")
    folder = commit(tmp_path / "set", with_frames(whole, [frame] * 3, [checksum32(bytes(SLICE_BYTES))] * 3))
    with opened(folder, verify=verify) as shards:
        for z in range(3):
            with pytest.raises(dinox_io.ShardError, match=rf"shard-000000\.tar: volume \w+: slice {z}: "):
                shards.read(0, z, z + 1)
    assert len(dinox_io.verify_set(folder)) >= 1


MEMORY = """
import resource, sys, warnings
import dinox_io
warnings.simplefilter("ignore")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        with dinox_io.open_shards(folder) as shards:
            shards.read(0, 0, 1)
    except dinox_io.ShardError:
        pass
    dinox_io.verify_set(folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_what_is_claimed_is_never_allocated(tmp_path: Path, make_volume, repository: Path) -> None:
    whole = encode_volume(make_volume(1, SHAPE), filter="none")
    folders = [
        commit(tmp_path / str(number), with_frames(whole, [frame] * 3))
        for number, frame in enumerate((BOMB, HUGE_WINDOW, CLAIMS_TOO_MUCH))
    ]
    for name in ("index.msgpack", "manifest.json"):  # 64 GiB, and nothing of it on the disk
        folders.append(commit(tmp_path / name, whole))
        os.truncate(folders[-1] / name, 1 << 36)
    folders.append(commit(tmp_path / "map", whole))
    adopt(folders[-1], b"\xdf\xff\xff\xff\xff")
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10  # KiB


# --- the index ---------------------------------------------------------------------------------------------------


@pytest.fixture
def volumes(make_volume) -> list[Volume]:
    return [make_volume(number, SHAPE) for number in range(3)]


@pytest.fixture
def folder(tmp_path: Path, volumes, write_set) -> Path:
    write_set(tmp_path / "set", [volumes[:2], volumes[2:]])
    return tmp_path / "set"


def column(folder: Path, name: str, dtype: str) -> np.ndarray:
    return np.frombuffer(msgpack.unpackb((folder / "index.msgpack").read_bytes())["columns"][name], dtype).copy()


def exchanged(values: np.ndarray) -> np.ndarray:
    values[[0, 1]] = values[[1, 0]]
    return values


@pytest.mark.parametrize(
    ("name", "dtype", "change"),
    [
        ("frame_bytes", "<u4", exchanged),  # frames of one volume, of another cut
        ("checksum", "<u4", exchanged),
        ("checksum", "<u4", lambda values: values ^ 1),
        ("filter", "u1", lambda values: values * 0),
        ("filter", "u1", lambda values: values * 0 + 1),
        ("spacing_mm", "<f8", lambda values: values * 2),
        ("spacing_mm", "<f8", lambda values: values * np.nan),
        ("orientation", "<f8", lambda values: -values),
        ("z_mm", "<f8", lambda values: values[::-1].copy()),
        ("body_offset", "<u8", lambda values: values + 1),
        ("body_offset", "<u8", lambda values: values * 0 + values[0]),  # on top of each other
        ("meta_bytes", "<u8", lambda values: values - 1),
        ("meta_offset", "<u8", lambda values: values - 512),
        ("shard", "<u4", lambda values: 1 - values),
        ("shape", "<u4", lambda values: values.reshape(-1, 3)[:, [0, 2, 1]].ravel().copy()),
    ],
)
def test_an_index_that_lies_within_bounds(
    folder: Path, volumes, name: str, dtype: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    forged(folder, **{name: change(column(folder, name, dtype)).astype(dtype).tobytes()})
    try:
        shards = opened(folder)
    except dinox_io.ShardError:
        return
    with shards:
        assert len(shards.volumes) == 3
        for record in shards.volumes:
            volume = next(volume for volume in volumes if volume.id == record.id)
            np.testing.assert_array_equal(shards.read(record, 0, 3), volume.hu)
            assert tuple(record.z_positions_mm) == volume.z_positions_mm
            assert record.orientation == volume.orientation
            assert tuple(shards.spacing_of(np.array([record.index]))[0]) == volume.spacing_mm


def test_random_columns(folder: Path, volumes) -> None:
    """Whatever numbers stand in an index: the pixels are right, or it is an error."""
    random = np.random.default_rng(0)
    whole, manifest = ((folder / name).read_bytes() for name in ("index.msgpack", "manifest.json"))
    document = msgpack.unpackb(whole)
    used = 0
    for _ in range(100):
        name = sorted(document["columns"])[random.integers(len(document["columns"]))]
        data = bytearray(document["columns"][name])
        data[random.integers(len(data))] = random.integers(256)
        forged(folder, **{name: bytes(data)})
        try:
            with opened(folder) as shards:
                for record in shards.volumes:
                    volume = next(volume for volume in volumes if volume.id == record.id)
                    np.testing.assert_array_equal(shards.read(record, 0, 3), volume.hu)
                used += 1
        except dinox_io.ShardError:
            pass
        (folder / "index.msgpack").write_bytes(whole)
        (folder / "manifest.json").write_bytes(manifest)
    assert used > 30


def test_an_index_larger_than_its_volumes_can_need_is_not_read(folder: Path) -> None:
    with (folder / "index.msgpack").open("ab") as file:
        file.truncate(1 << 20)
    with pytest.warns(UserWarning, match=r"index\.msgpack: has more than"), dinox_io.open_shards(folder) as shards:
        shards.read(0, 0, 3)


# --- the archive -------------------------------------------------------------------------------------------------


def members(folder: Path, change: Callable[[tarfile.TarInfo], Any], kind: int) -> Path:
    """The first member of the set's volume with another header, the manifest signed anew for it."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as archive:
        information = archive.getmembers()[1]
    start = information.offset
    change(information)
    header = information.tobuf(kind, "utf-8", "surrogateescape")
    data = path.read_bytes()
    path.write_bytes(data[:start] + header + data[start + 512 :])
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x.json"},
        {"name": "/etc/x.json"},
        {"name": "a/../../x.json"},
        {"name": "x" * 90 + "/" + "y" * 90 + ".json"},
        {"name": "x" * 300 + ".json"},
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../x"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
        {"type": tarfile.BLKTYPE},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.DIRTYPE},
        {"type": tarfile.GNUTYPE_SPARSE},
        {"type": tarfile.CONTTYPE},
        {"mode": 0o4777},
        {"uid": 1},
        {"mtime": 1},
        {"uname": "root"},
        {"size": 1 << 34},
        {"pax_headers": {"size": "1"}},
        {"pax_headers": {"size": "99999999999", "path": "../x"}},
        {"pax_headers": {"GNU.sparse.realsize": "99999999999"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_members(tmp_path: Path, make_volume, changes: dict[str, Any], kind: int) -> None:
    folder = commit(tmp_path / "set", encode_volume(make_volume(1, SHAPE)))

    def change(information: tarfile.TarInfo) -> None:
        for name, value in changes.items():
            setattr(information, name, value)

    try:
        path = members(folder, change, kind)
    except ValueError:  # this kind of archive cannot say so
        assert kind == tarfile.USTAR_FORMAT
        return
    manifest = json.loads((folder / "manifest.json").read_text())
    before = path.stat().st_size
    manifest["shards"][0]["size"] = before
    (folder / "manifest.json").write_bytes(serialize_manifest(resign(manifest)))
    if changes.keys() == {"pax_headers"} and kind != tarfile.PAX_FORMAT:
        return  # other kinds have no such headers: nothing was changed
    outside = sorted(tmp_path.rglob("*"))
    with pytest.raises(dinox_io.ShardError, match=r"shard-000000\.tar"):
        opened(folder)
    assert dinox_io.verify_set(folder) != []
    assert sorted(tmp_path.rglob("*")) == outside


# --- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("codec", "bp32"),
        ("quant", 3),
        ("filter", "wavelet"),
        ("encoding", "hu-float16"),
        ("unit", "SUV"),
    ],
)
def test_a_volume_of_another_version_is_refused(
    tmp_path: Path, make_volume, index: bool, name: str, value: object
) -> None:
    """Its frames would decode: to other values than were meant. With an index, too, which says nothing of it."""
    whole = encode_volume(make_volume(1, SHAPE))
    folder = commit(tmp_path / "right", whole)
    with opened(folder) as shards:
        data = encode_index(shards._index)
    folder = commit(tmp_path / "set", replace(whole, meta=canonical_json(json.loads(whole.meta) | {name: value})))
    manifest = json.loads((folder / "manifest.json").read_text())
    if index:
        shift = len(canonical_json({name: value})) - len(canonical_json({name: json.loads(whole.meta)[name]}))
        document = msgpack.unpackb(data)
        size = np.frombuffer(document["columns"]["meta_bytes"], "<u8") + np.uint64(shift % 2**64)
        document["columns"]["meta_bytes"] = size.astype("<u8").tobytes()
        data = msgpack.packb(document)
        assert data is not None
        (folder / "index.msgpack").write_bytes(data)
        manifest["index_sha256"] = hashlib.sha256(data).hexdigest()
        (folder / "manifest.json").write_bytes(serialize_manifest(resign(manifest)))
    with pytest.raises(dinox_io.ShardError, match=rf"shard-000000\.tar.*{name}"):
        opened(folder)


def test_a_shard_of_another_version_is_refused(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version":1}', b'"version":2}', 1))
    with pytest.raises(dinox_io.ShardError, match=r"shard-000001\.tar: version is 2, this version reads 1"):
        opened(folder)
