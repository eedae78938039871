"""Strangers read our shards: plain tar, webdataset, plain zstd, and the reader of docs/format.md."""

import io
import json
import re
import struct
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

import dinox_io


@pytest.fixture(params=["none", "planes", "hilp"])
def packed(request: pytest.FixtureRequest, tmp_path: Path, make_volume, write_set):
    volumes = [make_volume(1, (5, 18, 20)), make_volume(2, (2, 7, 12))]
    write_set(tmp_path / "set", [volumes], filter=request.param)
    return tmp_path / "set" / "shard-000000.tar", {volume.id: volume.hu for volume in volumes}, request.param


def test_seekable_zstd(packed) -> None:
    """Parsed from the published format: skippable frame at the end, a footer with magic, entries before it."""
    path, pixels, name = packed
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if not member.name.endswith(".zst"):
                continue
            data = archive.extractfile(member).read()
            count, descriptor, magic = struct.unpack("<IBI", data[-9:])
            assert (magic, descriptor) == (0x8F92EAB1, 0x80)
            size = 8 + 12 * count + 9
            assert struct.unpack("<II", data[-size : 8 - size]) == (0x184D2A5E, size - 8)
            hu = pixels[member.name.split(".")[0]]
            assert count == len(hu)
            offset = 0
            for z, entry in enumerate(struct.iter_unpack("<III", data[8 - size : -9])):
                plain = zstandard.decompress(data[offset : offset + entry[0]])
                assert (len(plain), xxhash.xxh64_intdigest(plain) & 0xFFFFFFFF) == entry[1:]
                if name == "none":
                    assert plain == hu[z].astype("<i2").tobytes()
                offset += entry[0]
            assert offset + size == len(data)


def test_tar_and_zstd_commands(packed) -> None:
    """`tar xO SHARD KEY.hu16.zst | zstd -d` is the raw volume, with filter none. zstd skips the seek table."""
    path, pixels, name = packed
    for key, hu in pixels.items():
        member = subprocess.run(["tar", "xOf", path, f"{key}.hu16.zst"], capture_output=True, check=True).stdout
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(member), read_across_frames=True)
        raw = reader.read(2 * hu.size + 1) if hu.size else b""
        assert len(raw) == 2 * hu.size
        assert (raw == hu.astype("<i2").tobytes()) == (name == "none")
    listing = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listing.stderr == ""
    assert len(listing.stdout.split()) == 5


def test_webdataset(packed) -> None:
    path, pixels, _ = packed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset's own
        webdataset = pytest.importorskip("webdataset")
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == list(pixels)
    for sample in samples:
        assert sample["json"]["shape"] == list(pixels[sample["__key__"]].shape)
        assert isinstance(sample["hu16.zst"], bytes)


def test_the_reader_of_the_documentation(packed, repository: Path) -> None:
    """The example in docs/format.md, run as it stands there."""
    path, pixels, _ = packed
    text = (repository / "docs" / "format.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert source is not None
    names: dict = {}
    exec(compile(source[1], "docs/format.md", "exec"), names)  # noqa: S102 (the document's own example)
    found = names["read_shard"](path)
    assert found.keys() == pixels.keys()
    for key, hu in pixels.items():
        np.testing.assert_array_equal(found[key], hu)


def test_the_manifest_is_json_that_anyone_can_check(packed) -> None:
    """With nothing but a JSON library and sha256, as docs/format.md tells."""
    import hashlib

    manifest = json.loads((packed[0].parent / "manifest.json").read_bytes())
    claimed = manifest.pop("self")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == claimed
    with dinox_io.open_shards(packed[0].parent) as shards:
        assert shards.digest == claimed
