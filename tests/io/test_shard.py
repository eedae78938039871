"""The shard: deterministic bytes, the size it says, and a reader that refuses what the writer would not write."""

import dataclasses
import hashlib
import io
import json
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest

from dinox_io.errors import ShardError
from dinox_io.hounsfield import volume_digest
from dinox_io.record import RESERVED_KEYS
from dinox_io.shard import PACKER, ShardSummary, ShardWriter, encode_volume, member_header, read_shard_index
from dinox_io.storage import LocalFile
from dinox_io.volume import Volume

CONFIG = "c" * 64


def write(path: Path, volumes: list[Volume]) -> ShardSummary:
    with ShardWriter(path, config_digest=CONFIG) as writer:
        for volume in volumes:
            encoded = encode_volume(volume)
            before = writer.size_bytes
            writer.add(encoded)
            assert writer.size_bytes == before + ShardWriter.member_bytes(encoded)
        size = writer.size_bytes
        summary = writer.finish()
    assert summary.size == size == path.stat().st_size
    return summary


@pytest.fixture
def volumes(make_volume) -> list[Volume]:
    return [make_volume(1), make_volume(2, (3, 15, 9)), make_volume(3, (1, 4, 4))]


def index_of(path: Path):
    file = LocalFile(path)
    try:
        return read_shard_index(file, file.size)
    finally:
        file.close()


def test_same_input_same_bytes(tmp_path: Path, volumes: list[Volume]) -> None:
    first, second = write(tmp_path / "a.tar", volumes), write(tmp_path / "b.tar", volumes)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert first.sha256 == second.sha256 == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()


def test_members_as_the_format_says(tmp_path: Path, volumes: list[Volume]) -> None:
    write(tmp_path / "a.tar", volumes)
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
        names = [member.name for member in members]
        head = json.load(archive.extractfile(members[0]))
        record = json.load(archive.extractfile(members[1]))
    keys = [f"{volume.id}{suffix}" for volume in volumes for suffix in (".json", ".hu16.zst")]
    assert names == ["__dinox__/shard.json", *keys]
    assert {(m.uid, m.gid, m.mtime, m.mode, m.type, m.uname) for m in members} == {
        (0, 0, 0, 0o644, tarfile.REGTYPE, "")
    }
    assert (head["format"], head["version"], head["config_digest"]) == ("dinox-shard", 1, CONFIG)
    volume = volumes[0]
    assert record.keys() == RESERVED_KEYS | {"kernel", "kvp"}
    assert record["shape"] == list(volume.hu.shape)
    assert record["sha256"] == volume_digest(volume.hu)
    assert (record["dtype"], record["unit"], record["encoding"]) == ("<i2", "HU", "hu-int16")
    assert (record["filter"], record["codec"], record["quant"]) == ("hilp", "zstd", 1)
    assert record["z_mm"] == list(volume.z_positions_mm)
    assert record["direction"] == list(volume.orientation)
    assert (record["patient"], record["series"]) == (volume.patient, volume.series)


def test_the_packer_is_the_version_of_the_project(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"dinox_io {project['version']}" == PACKER


def test_index_is_what_was_written(tmp_path: Path, volumes: list[Volume]) -> None:
    summary = write(tmp_path / "a.tar", volumes)
    entries = index_of(tmp_path / "a.tar")
    for volume, told, entry in zip(volumes, summary.volumes, entries, strict=True):
        assert (entry.meta.id, entry.meta.shape, entry.meta.digest) == (volume.id, volume.hu.shape, told.digest)
        assert (entry.offset, entry.meta_bytes) == (told.offset, told.meta_bytes)
        assert (entry.meta_sha256, entry.seek_table_sha256) == (told.meta_sha256, told.seek_table_sha256)
        assert len(entry.frames) == volume.hu.shape[0]
    assert summary.histogram.sum() == sum(volume.hu.size for volume in volumes)


def test_nothing_stays_of_an_aborted_shard(tmp_path: Path, volumes: list[Volume]) -> None:
    with ShardWriter(tmp_path / "a.tar", config_digest=CONFIG) as writer:
        writer.add(encode_volume(volumes[0]))  # and never finished
    assert list(tmp_path.iterdir()) == []


def test_refusals_when_writing(tmp_path: Path, volumes: list[Volume]) -> None:
    volume = volumes[0]
    with pytest.raises(ValueError, match="filter"):
        encode_volume(volume, filter="zip")
    for name in ("../x", "a/b", "a.b", "", "x" * 91, "ü"):
        with pytest.raises(ValueError, match="cannot name a member"):
            encode_volume(dataclasses.replace(volume, id=name))
    with pytest.raises(ValueError, match="shape"):
        encode_volume(dataclasses.replace(volume, facts={"shape": 1}))
    with pytest.raises(ValueError, match="JSON"):
        encode_volume(dataclasses.replace(volume, facts={"kvp": float("nan")}))
    with ShardWriter(tmp_path / "a.tar", config_digest=CONFIG) as writer:
        writer.add(encode_volume(volume))
        with pytest.raises(ValueError, match="already"):
            writer.add(encode_volume(volume))
    with pytest.raises(ValueError, match="cannot name a shard"):
        ShardWriter(tmp_path / ".hidden", config_digest=CONFIG)


def rebuilt(path: Path, change) -> None:
    """Write the shard again with each (name, data) passed through `change`, headers as our writer makes them."""
    members = []
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            members.append((member.name, archive.extractfile(member).read()))
    data = bytearray()
    for name, content in change(members):
        data += member_header(name, len(content)) + content + bytes(-len(content) % 512)
    path.write_bytes(bytes(data) + bytes(1024))


def edited(**changes):
    """A change of the first KEY.json; a value of None removes the key."""

    def change(members):
        record = json.loads(members[1][1])
        for key, value in changes.items():
            record[key] = value
            if value is None:
                del record[key]
        return [members[0], (members[1][0], json.dumps(record).encode()), *members[2:]]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edited(version=2), "version is 2"),
        (edited(version=True), "version is True"),
        (edited(filter="wavelet"), "unknown filter"),
        (edited(codec="bp32"), "unknown codec"),
        (edited(encoding="hu-float"), "encoding"),
        (edited(encoding=None), "encoding"),
        (edited(quant=3), "quant is 3"),
        (edited(dtype=">i2"), "dtype"),
        (edited(unit="counts"), "unit"),
        (edited(id="other"), "id is"),
        (edited(shape=[6, 16]), "shape"),
        (edited(shape=[6, 1 << 20, 1 << 20]), "shape"),
        (edited(shape=[-6, 16, 20]), "shape"),
        (edited(shape=[7, 16, 20], z_mm=[0] * 7), "seek table"),
        (edited(shape=[6, 16, 21]), "seek table"),
        (edited(z_mm=[1, 2]), "z_mm"),
        (edited(z_mm=["a"] * 6), "z_mm"),
        (edited(z_mm=[10**400] * 6), "z_mm"),
        (edited(direction=None), "direction"),
        (edited(patient=5), "patient"),
        (lambda members: [members[0], (members[1][0], b"[" * 100000), *members[2:]], "not JSON"),
        (lambda members: [members[0], (members[1][0], b'{"a":1,"a":2}'), *members[2:]], "twice"),
        (lambda members: [members[0], (members[1][0], b"[1]"), *members[2:]], "object"),
        (lambda members: [members[0], (members[1][0], b"\xff"), *members[2:]], "not JSON"),
        (lambda members: [members[0], members[2], members[1]], "first member of a new volume"),
        (lambda members: [members[0], members[1]], "where a member should begin"),
        (lambda members: [members[0], *members[1:3], *members[1:3]], "first member of a new volume"),
        (lambda members: members[1:], "__dinox__/shard.json"),
        (lambda members: [(members[0][0], b'{"format":"dinox-shard","version":2}'), *members[1:]], "version is 2"),
        (lambda members: [*members[:2], (members[2][0], members[2][1] + b"x")], "seek table"),
        (lambda members: [*members[:2], (members[2][0], b"")], "seek table"),
        (lambda members: [*members, ("../evil.json", b"{}")], "first member of a new volume"),
        (lambda members: [*members, ("/etc/x.json", b"{}")], "first member of a new volume"),
    ],
)
def test_a_reader_refuses(tmp_path: Path, volumes: list[Volume], change, reason: str) -> None:
    write(tmp_path / "a.tar", volumes[:1])
    rebuilt(tmp_path / "a.tar", change)
    with pytest.raises(ShardError, match=reason) as error:
        index_of(tmp_path / "a.tar")
    assert "a.tar" in str(error.value)


def test_unknown_keys_are_ignored(tmp_path: Path, volumes: list[Volume]) -> None:
    write(tmp_path / "a.tar", volumes[:1])
    rebuilt(tmp_path / "a.tar", edited(from_the_future={"x": [1]}))
    assert index_of(tmp_path / "a.tar")[0].meta.id == volumes[0].id


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE])
def test_links_devices_and_extended_headers_are_refused(tmp_path: Path, volumes: list[Volume], kind: bytes) -> None:
    write(tmp_path / "a.tar", volumes[:1])
    hostile = tarfile.TarInfo("evil.json")
    hostile.type, hostile.linkname = kind, "/etc/passwd"
    data = (tmp_path / "a.tar").read_bytes()[:-1024]
    (tmp_path / "a.tar").write_bytes(data + hostile.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(ShardError):
        index_of(tmp_path / "a.tar")


def test_a_size_that_lies_allocates_nothing(tmp_path: Path, volumes: list[Volume]) -> None:
    write(tmp_path / "a.tar", volumes[:1])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[512 * 2 : 512 * 3] = member_header(f"{volumes[0].id}.json", 8**11 - 1)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardError, match="beyond the shard"):
        index_of(tmp_path / "a.tar")


def test_rebuilding_members_unchanged_gives_the_same_shard(tmp_path: Path, volumes: list[Volume]) -> None:
    """The tests above are about what they change, not about how they rewrite."""
    write(tmp_path / "a.tar", volumes)
    before = (tmp_path / "a.tar").read_bytes()
    rebuilt(tmp_path / "a.tar", lambda members: members)
    assert (tmp_path / "a.tar").read_bytes() == before
    assert io.BytesIO(before).read(257 + 8)[257:] == b"ustar\x0000"


def test_pixels_decode_to_the_volume(tmp_path: Path, volumes: list[Volume]) -> None:
    from dinox_io.codec import SliceDecoder

    write(tmp_path / "a.tar", volumes)
    data = (tmp_path / "a.tar").read_bytes()
    for volume, entry in zip(volumes, index_of(tmp_path / "a.tar"), strict=True):
        offset, decoder = entry.body_offset, SliceDecoder(entry.meta.filter)
        out = np.empty_like(volume.hu)
        for z, (length, _, checksum) in enumerate(entry.frames.tolist()):
            decoder.decode_into(data[offset : offset + length], out[z], checksum)
            offset += length
        np.testing.assert_array_equal(out, volume.hu)
