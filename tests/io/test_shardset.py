"""Opening a set: its records, its index that is never trusted, earlier manifests, and that opening never writes."""

import hashlib
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest

import dinox_io
from dinox_io.canonical import canonical_json
from dinox_io.hounsfield import volume_digest
from dinox_io.manifest import serialize_manifest
from dinox_io.storage import LocalFile


@pytest.fixture
def volumes(make_volume):
    return [make_volume(1), make_volume(2, (3, 15, 9)), make_volume(3, (4, 8, 8))]


@pytest.fixture
def folder(tmp_path: Path, volumes, write_set) -> Path:
    write_set(tmp_path / "set", [volumes[:2], volumes[2:]], sides={volumes[2].id: "val"})
    return tmp_path / "set"


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_records(folder: Path, volumes) -> None:
    by_id = {volume.id: volume for volume in volumes}
    with dinox_io.open_shards(folder) as shards:
        assert [record.id for record in shards.volumes] == sorted(by_id)
        assert shards.digest == shards.manifest["self"]
        for number, record in enumerate(shards.volumes):
            volume = by_id[record.id]
            assert record.index == number
            assert (record.shape, record.spacing_mm) == (volume.hu.shape, volume.spacing_mm)
            assert (record.patient, record.series) == (volume.patient, volume.series)
            assert record.orientation == volume.orientation
            assert tuple(record.z_positions_mm) == volume.z_positions_mm
            assert record.digest == volume_digest(volume.hu)
            assert record.split == ("val" if volume is volumes[2] else "train")
            np.testing.assert_array_equal(shards.read(record, 0, record.shape[0]), volume.hu)
            np.testing.assert_array_equal(shards.read(number, 1, 2), volume.hu[1:2])


@pytest.mark.parametrize("filter", ["none", "planes", "hilp"])
def test_filters_may_mix_in_a_set(tmp_path: Path, volumes, write_set, filter: str) -> None:
    first = write_set(tmp_path / "set", [volumes[:1]])
    write_set(tmp_path / "set", [volumes[1:]], filter=filter, previous=first)
    with dinox_io.open_shards(tmp_path / "set") as shards:
        for volume in volumes:
            record = next(record for record in shards.volumes if record.id == volume.id)
            np.testing.assert_array_equal(shards.read(record, 0, record.shape[0]), volume.hu)


def test_opening_never_writes(folder: Path) -> None:
    (folder / "index.msgpack").unlink()
    before = state(folder)
    with pytest.warns(UserWarning, match=r"index\.msgpack.*rebuilt"), dinox_io.open_shards(folder) as shards:
        shards.read(0, 0, 1)
    assert state(folder) == before


def forged(folder: Path, **columns: object) -> None:
    """An index with other columns, and a manifest that names it: only checks of its contents can tell."""
    document = msgpack.unpackb((folder / "index.msgpack").read_bytes())
    document["columns"] |= columns
    adopt(folder, msgpack.packb(document))


def adopt(folder: Path, data: bytes) -> None:
    (folder / "index.msgpack").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dinox_io.open_shards(folder) as shards:
            manifest = dict(shards.manifest)
    manifest["index_sha256"] = hashlib.sha256(data).hexdigest()
    others = {key: value for key, value in manifest.items() if key != "self"}
    manifest["self"] = hashlib.sha256(canonical_json(others)).hexdigest()
    (folder / "manifest.json").write_bytes(serialize_manifest(manifest))


@pytest.mark.parametrize(
    "columns",
    [
        {"body_offset": np.full(3, 2**63, "<u8").tobytes()},
        {"body_offset": np.zeros(3, "<u8").tobytes()},
        {"meta_offset": np.full(3, 2**64 - 512, "<u8").tobytes()},
        {"meta_bytes": np.full(3, 2**64 - 1, "<u8").tobytes()},
        {"frame_bytes": np.full(13, 2**32 - 1, "<u4").tobytes()},
        {"frame_bytes": np.zeros(13, "<u4").tobytes()},
        {"frame_bytes": b"123"},
        {"shape": np.full((3, 3), 2**31, "<u4").tobytes()},
        {"shard": np.full(3, 7, "<u4").tobytes()},
        {"filter": bytes([9, 9, 9])},
        {"checksum": None},
        {"z_mm": np.zeros(2, "<f8").tobytes()},
    ],
)
def test_a_forged_index_is_not_used(folder: Path, volumes, columns: dict) -> None:
    forged(folder, **columns)
    with pytest.warns(UserWarning, match=r"index\.msgpack"):
        shards = dinox_io.open_shards(folder)
    with shards:
        for volume in volumes:
            record = next(record for record in shards.volumes if record.id == volume.id)
            np.testing.assert_array_equal(shards.read(record, 0, record.shape[0]), volume.hu)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91" * 200000,  # arrays in arrays
        b"\x81\xa1a" * 100000,  # maps in maps
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 members
        b"\xc6\xff\xff\xff\xff",  # bytes of 2^32
        b"\xc9\xff\xff\xff\xff\x01",  # an extension type
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        msgpack.packb({"format": "dinox-index", "version": 2, "columns": {}}),
        msgpack.packb({"format": "dinox-index", "version": 1, "columns": [1]}),
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
    ],
)
def test_a_hostile_index_is_not_used(folder: Path, data: bytes) -> None:
    adopt(folder, data)
    with pytest.warns(UserWarning, match=r"index\.msgpack"), dinox_io.open_shards(folder) as shards:
        shards.read(0, 0, 1)


def test_an_index_that_lies_within_bounds_is_refused(folder: Path) -> None:
    """Two volumes exchanged: every offset is possible, and the digests of KEY.json tell."""
    document = msgpack.unpackb((folder / "index.msgpack").read_bytes())
    offsets = np.frombuffer(document["columns"]["meta_offset"], "<u8").copy()
    shards_of = np.frombuffer(document["columns"]["shard"], "<u4")
    pair = np.flatnonzero(shards_of == 0)
    offsets[pair[1]] = offsets[pair[0]] = offsets[pair].min()
    forged(folder, meta_offset=offsets.tobytes())
    with pytest.raises(dinox_io.ShardError, match=r"KEY\.json is not the one"):
        dinox_io.open_shards(folder)


def test_an_earlier_manifest_opens_as_it_was(tmp_path: Path, volumes, write_set) -> None:
    first = write_set(tmp_path / "set", [volumes[:1]])
    write_set(tmp_path / "set", [volumes[1:]], previous=first)
    with dinox_io.open_shards(tmp_path / "set" / "manifests" / f"{first['self']}.json") as shards:
        assert shards.digest == first["self"]
        assert [record.id for record in shards.volumes] == [volumes[0].id]
        np.testing.assert_array_equal(shards.read(0, 0, 6), volumes[0].hu)


def test_verify_options(folder: Path, volumes) -> None:
    """First: a frame is hashed once; always: each time; never: not at all. Told by damage done to an open set."""
    with dinox_io.open_shards(folder) as shards:
        record = next(record for record in shards.volumes if record.id == volumes[0].id)
        offset = sum(shards._index.frames(record.index, 2, 3)) // 2
        path = folder / "shard-000000.tar"
        whole = path.read_bytes()
        always, never = (dinox_io.open_shards(folder, verify=verify) for verify in ("always", "never"))
        shards.read(record, 2, 3)
        always.read(record.index, 2, 3)
        wrong = 0
        for bit in range(8):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1 :])
            with pytest.raises(dinox_io.ShardError):
                always.read(record.index, 2, 3)
            for lax in (shards, never):
                try:
                    wrong += int((lax.read(record.index, 2, 3) != volumes[0].hu[2:3]).any())
                except dinox_io.ShardError:
                    continue  # zstd itself saw it
        assert wrong > 0
        always.close()
        never.close()
    with pytest.raises(ValueError, match="first, always, never"):
        dinox_io.open_shards(folder, verify="sometimes")
    with pytest.raises(ValueError, match="clamp, reflect, error"):
        dinox_io.open_shards(folder, edge="wrap")


def test_volumes_of_another_set_are_refused(folder: Path) -> None:
    with dinox_io.open_shards(folder) as shards, dinox_io.open_shards(folder) as other:
        with pytest.raises(IndexError, match="not one of this set"):
            shards.read(other.volumes[0], 0, 1)
        for number in (-1, 3):
            with pytest.raises(IndexError, match="not one of this set"):
                shards.read(number, 0, 1)


def test_an_empty_side_says_what_each_has(folder: Path) -> None:
    with dinox_io.open_shards(folder) as shards, pytest.raises(ValueError, match="train 2, val 1, test 0, none 0"):
        shards.windows("test")


def test_many_threads_read_the_same_pixels(folder: Path, volumes) -> None:
    pixels = {volume.id: volume.hu for volume in volumes}
    barrier = threading.Barrier(6)

    def read_all(seed: int) -> bool:
        barrier.wait()
        random = np.random.default_rng(seed)
        same = True
        for _ in range(200):
            record = shards.volumes[random.integers(len(shards.volumes))]
            center = int(random.integers(record.shape[0]))
            same &= bool((shards.read_window(record, center)[1] == pixels[record.id][center]).all())
        return same

    with dinox_io.open_shards(folder) as shards, ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read_all, range(6)))


def test_a_thousand_volumes_open_fast(tmp_path: Path, make_volume, write_set) -> None:
    volumes = [make_volume(number, (30, 4, 4)) for number in range(1000)]
    write_set(tmp_path / "set", [volumes[start : start + 250] for start in range(0, 1000, 250)])
    begin_s = time.process_time()
    with dinox_io.open_shards(tmp_path / "set") as shards:
        assert len(shards.volumes) == 1000
    assert time.process_time() - begin_s < 1.0


def test_a_file_that_ends_while_it_is_read(folder: Path) -> None:
    with dinox_io.open_shards(folder) as shards:
        (folder / "shard-000000.tar").write_bytes(b"")
        with pytest.raises(dinox_io.ShardError, match=r"shard-000000\.tar: volume \w+: ends at byte \d+"):
            [shards.read(record, 0, 1) for record in shards.volumes]
    with pytest.raises(dinox_io.ShardError, match="cannot be opened"):
        LocalFile(folder / "absent.tar")
