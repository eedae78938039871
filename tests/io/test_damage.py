"""Damage (F15 to F19): every cut and every flipped bit is ShardError or changes no pixel. Never wrong pixels."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import dinox_io


@pytest.fixture
def whole(tmp_path: Path, make_volume, write_set):
    """A small set of two shards; its folder and its pixels by id."""
    volumes = [make_volume(number, (3, 12, 16)) for number in range(4)]
    write_set(tmp_path / "set", [volumes[:2], volumes[2:]])
    return tmp_path / "set", {volume.id: volume.hu for volume in volumes}


def read_all(folder: Path) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a damaged index
        with dinox_io.open_shards(folder) as shards:
            return {record.id: shards.read(record, 0, record.shape[0]) for record in shards.volumes}


def is_refused_or_right(folder: Path, pixels: dict[str, np.ndarray]) -> bool:
    """True if damage was found; fails if it was not and a pixel differs."""
    try:
        found = read_all(folder)
    except dinox_io.ShardError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "shard-00000" in message or "manifest.json" in message
        return True
    assert found.keys() == pixels.keys()
    for name, hu in pixels.items():
        np.testing.assert_array_equal(found[name], hu)
    return False


def test_the_whole_set_reads(whole) -> None:
    assert not is_refused_or_right(*whole)


def test_a_cut_at_every_block_is_found_at_open(whole) -> None:
    folder, _ = whole
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    cuts = [*range(0, len(data), 512), *np.random.default_rng(0).integers(0, len(data), 60).tolist()]
    for cut in cuts:
        path.write_bytes(data[:cut])
        for index in (True, False):
            if not index:
                (folder / "index.msgpack").unlink()
            with pytest.raises(dinox_io.ShardError, match=r"shard-000001\.tar: has \d+ bytes where the manifest says"):
                dinox_io.open_shards(folder)
            if not index:
                (folder / "index.msgpack").write_bytes(b"")


def flip(folder: Path, name: str, count: int, seed: int, pixels: dict[str, np.ndarray]) -> int:
    """Flip one bit of a file, `count` times; how often it was noticed."""
    path, random = folder / name, np.random.default_rng(seed)
    data, noticed = path.read_bytes(), 0
    for bit in random.integers(0, 8 * len(data), count):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        noticed += is_refused_or_right(folder, pixels)
    path.write_bytes(data)
    return noticed


@pytest.mark.parametrize(("name", "count"), [("shard-000000.tar", 120), ("manifest.json", 40), ("index.msgpack", 40)])
def test_flipped_bits(whole, name: str, count: int) -> None:
    noticed = flip(whole[0], name, count, 0, whole[1])
    # Padding and the headers of whole members hold no pixels; in a manifest every bit counts, in an index none.
    assert noticed == {"manifest.json": count, "index.msgpack": 0}.get(name, noticed)
    assert name != "shard-000000.tar" or noticed > count // 4


def test_flipped_bits_without_an_index(whole) -> None:
    (whole[0] / "index.msgpack").unlink()
    # Now everything is read: headers, padding, records. Only unused bits of zstd frames may pass.
    assert flip(whole[0], "shard-000000.tar", 60, 1, whole[1]) >= 58


@pytest.mark.fault
def test_a_thousand_flipped_bits(whole) -> None:
    for seed, name in enumerate(("shard-000000.tar", "shard-000001.tar")):
        flip(whole[0], name, 500, seed, whole[1])


def test_shards_that_changed_places(tmp_path: Path, make_volume, write_set) -> None:
    """Of the same size too: the pixels are constant, so only ids and digests differ."""
    volumes = [make_volume(number, (3, 8, 8)) for number in range(2)]
    for volume in volumes:
        volume.hu[:] = 5
    write_set(tmp_path / "set", [[volume] for volume in volumes])
    one, two = (tmp_path / "set" / f"shard-00000{number}.tar" for number in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(dinox_io.ShardError, match="not the one that was packed"):
        dinox_io.open_shards(tmp_path / "set")


def test_an_edited_record_is_found_at_open(whole) -> None:
    path = whole[0] / "shard-000000.tar"
    data = path.read_bytes()
    edited = data.replace(b'"spacing_mm":[2.0,', b'"spacing_mm":[9.0,', 1)
    assert edited != data
    path.write_bytes(edited)
    with pytest.raises(dinox_io.ShardError, match=r"KEY\.json is not the one that was packed"):
        dinox_io.open_shards(whole[0])


@pytest.mark.parametrize("name", ["manifest.json", "shard-000001.tar"])
def test_a_missing_file(whole, name: str) -> None:
    (whole[0] / name).unlink()
    with pytest.raises(dinox_io.ShardError, match=name.replace(".", r"\.")):
        dinox_io.open_shards(whole[0])


def test_not_a_set_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "manifest.json"):
        with pytest.raises(dinox_io.ShardError):
            dinox_io.open_shards(path)
