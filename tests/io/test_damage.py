"""Damage (F15, F16, F21): every cut, flipped bit, empty or exchanged block and missing file is ShardError or changes no
pixel, in shards, manifest and index alike. Never wrong pixels. What is forged stands in test_hostile_sets.py.
"""

import errno
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dinox_io


@pytest.fixture
def whole(tmp_path: Path, make_volume, write_set):
    """A small set of two shards; its folder and its pixels by id."""
    volumes = [make_volume(number, (3, 12, 16)) for number in range(4)]
    write_set(tmp_path / "set", [volumes[:2], volumes[2:]])
    return tmp_path / "set", {volume.id: volume.hu for volume in volumes}


SHARDS = ("shard-000000.tar", "shard-000001.tar")
FILES = (*SHARDS, "manifest.json", "index.msgpack")


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
    cuts = [*range(0, len(data), 512), *np.random.default_rng(0).integers(0, len(data), 200).tolist()]
    for cut in cuts:
        path.write_bytes(data[:cut])
        for index in (True, False):
            if not index:
                (folder / "index.msgpack").unlink()
            with pytest.raises(dinox_io.ShardError, match=r"shard-000001\.tar: has \d+ bytes where the manifest says"):
                dinox_io.open_shards(folder)
            if not index:
                (folder / "index.msgpack").write_bytes(b"")


@pytest.mark.parametrize("name", ["manifest.json", "index.msgpack"])
def test_a_cut_manifest_or_index(whole, name: str) -> None:
    path = whole[0] / name
    data = path.read_bytes()
    for cut in [*range(0, len(data), 512), *np.random.default_rng(0).integers(0, len(data), 30).tolist()]:
        path.write_bytes(data[:cut])
        assert is_refused_or_right(*whole) == (name == "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_bytes_behind_the_end(whole, name: str) -> None:
    with (whole[0] / name).open("ab") as file:
        file.write(bytes(512))
    assert is_refused_or_right(*whole) == (name != "index.msgpack")


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


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(whole, name: str) -> None:
    noticed = flip(whole[0], name, 60, 0, whole[1])
    # Padding and the headers of whole members hold no pixels; in a manifest every bit counts, in an index none.
    assert noticed == {"manifest.json": 60, "index.msgpack": 0}.get(name, noticed)
    assert name not in SHARDS or noticed > 60 // 4


def test_flipped_bits_without_an_index(whole) -> None:
    (whole[0] / "index.msgpack").unlink()
    # Now everything is read: headers, padding, records. Only unused bits of zstd frames may pass.
    assert flip(whole[0], "shard-000000.tar", 60, 1, whole[1]) >= 58


@pytest.mark.fault
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_thousand_flipped_bits(whole, name: str, index: bool) -> None:
    if not index and name != "index.msgpack":
        (whole[0] / "index.msgpack").unlink()
    flip(whole[0], name, 1000, FILES.index(name) + 10 * index, whole[1])


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_blocks_that_became_empty(whole, name: str, index: bool) -> None:
    """As a disk or a copy that was cut off leaves them: each 512 bytes of the file in turn."""
    folder, pixels = whole
    if not index and name != "index.msgpack":
        (folder / "index.msgpack").unlink()
    path, noticed = folder / name, 0
    data = path.read_bytes()
    starts = [start for start in range(0, len(data), 512) if any(data[start : start + 512])]
    for start in starts:
        length = min(512, len(data) - start)
        path.write_bytes(data[:start] + bytes(length) + data[start + length :])
        noticed += is_refused_or_right(folder, pixels)
    assert noticed == {"manifest.json": len(starts), "index.msgpack": 0}.get(name, noticed)
    assert name not in SHARDS or noticed >= (len(starts) // 2 if index else len(starts))


@pytest.mark.parametrize("index", [True, False])
def test_blocks_that_changed_places(whole, index: bool) -> None:
    """Within a shard and between two, so that every byte is one that was packed."""
    folder, pixels = whole
    if not index:
        (folder / "index.msgpack").unlink()
    data = [(folder / name).read_bytes() for name in SHARDS]
    blocks = [(shard, start) for shard in (0, 1) for start in range(0, len(data[shard]), 512)]
    pairs = list(itertools.combinations(blocks, 2))
    noticed = tried = 0
    for number in np.random.default_rng(0).choice(len(pairs), 150, replace=False).tolist():
        (one, here), (other, there) = pairs[number]
        left, right = data[one][here : here + 512], data[other][there : there + 512]
        if left == right:
            continue
        damaged = [bytearray(content) for content in data]
        damaged[one][here : here + 512], damaged[other][there : there + 512] = right, left
        for name, content in zip(SHARDS, damaged, strict=True):
            (folder / name).write_bytes(content)
        tried += 1
        noticed += is_refused_or_right(folder, pixels)
    assert tried > 100
    assert noticed > tried // 2


def test_a_whole_volume_that_changed_its_place_with_one_of_the_same_size(
    tmp_path: Path, make_volume, write_set
) -> None:
    volumes = [make_volume(number, (1, 32, 32)) for number in range(8)]
    write_set(tmp_path / "set", [volumes], filter="none")
    path = tmp_path / "set" / "shard-000000.tar"
    data = path.read_bytes()
    size = (len(data) - 1024 - 1024) // 8
    pixels = {volume.id: volume.hu for volume in volumes}
    for one, other in itertools.combinations(range(8), 2):
        parts = [data[1024 + size * number : 1024 + size * (number + 1)] for number in range(8)]
        parts[one], parts[other] = parts[other], parts[one]
        path.write_bytes(data[:1024] + b"".join(parts) + data[1024 + 8 * size :])
        assert is_refused_or_right(tmp_path / "set", pixels)


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


@pytest.mark.parametrize("name", ["manifest.json", *SHARDS])
@pytest.mark.parametrize("harm", ["absent", "renamed", "empty", "folder", "pipe", "dangling", "of no one"])
def test_a_missing_file(whole, name: str, harm: str) -> None:
    path = whole[0] / name
    path.rename(whole[0] / f"old-{name}") if harm == "renamed" else path.unlink()
    if harm == "empty":
        path.touch()
    elif harm == "folder":
        path.mkdir()
    elif harm == "pipe":
        os.mkfifo(path)
    elif harm == "dangling":
        path.symlink_to("nowhere")
    elif harm == "of no one":
        path.symlink_to(path)
    with pytest.raises(dinox_io.ShardError, match=name.replace(".", r"\.")):
        dinox_io.open_shards(whole[0])


def test_a_missing_index_and_two_names_exchanged(whole) -> None:
    folder, pixels = whole
    (folder / "index.msgpack").unlink()
    assert not is_refused_or_right(folder, pixels)
    for source, target in ((SHARDS[0], "aside"), (SHARDS[1], SHARDS[0]), ("aside", SHARDS[1])):
        (folder / source).rename(folder / target)
    assert is_refused_or_right(folder, pixels)


@pytest.mark.parametrize("call", ["open", "fstat", "preadv"])
def test_a_system_call_that_fails_is_a_shard_error(whole, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A share that went away (ESTALE) while the set is opened, at any of its calls."""
    real, calls, said = getattr(os, call), 0, []

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == wanted:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*arguments, **options)

    wanted = 0
    while calls >= wanted:
        wanted, calls = wanted + 1, 0
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(os, call, fail)
            try:
                with dinox_io.open_shards(whole[0]) as shards:
                    shards.read(0, 0, 1)
            except dinox_io.ShardError as error:
                said.append(str(error))
    assert wanted > 3
    assert said
    assert all("Stale file handle" in message for message in said)


def test_the_open_set_verifies_itself(whole, make_volume, write_set) -> None:
    folder, _ = whole
    with dinox_io.open_shards(folder) as shards:
        assert shards.verify() == []
        assert shards.verify(threads=2) == []
        before = shards.manifest
        write_set(folder, [[make_volume(9)]], previous=before)
        assert shards.verify() == []  # it is the set that was opened, and its index is another one's by now
        path = folder / SHARDS[0]
        data = bytearray(path.read_bytes())
        data[data.index(b"\x28\xb5\x2f\xfd") + 20] ^= 1
        path.write_bytes(data)
        damages = shards.verify()
    assert [damage.file for damage in damages] == [SHARDS[0]]
    assert damages[0].volume in {record.id for record in shards.volumes}
    assert [str(damage) for damage in dinox_io.verify_set(folder / "manifests" / f"{before['self']}.json")] == [
        str(damage) for damage in damages
    ]


def test_not_a_set_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "manifest.json"):
        with pytest.raises(dinox_io.ShardError):
            dinox_io.open_shards(path)
