"""`verify_shards.py`: 0 for a whole set, 1 with the name of each damaged volume and of no other."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import verify_shards

from dinox_io import open_shards
from dinox_io.canonical import canonical_json
from dinox_io.manifest import build_manifest, commit_set
from dinox_io.pack import PackSettings, pack
from dinox_io.progress import ProgressReport
from dinox_io.shard import END_BYTES, ShardWriter, encode_volume
from dinox_io.verify import verify_set
from dinox_io.volume import Volume
from tests.io.dicom_factory import write_series
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three volumes each; the ids are one digit, 32 times."""
    summaries = []
    for number in range(2):
        with ShardWriter(tmp_path / f"shard-00000{number}.tar", config_digest="c") as writer:
            for digit in range(3 * number, 3 * number + 3):
                hu = np.random.default_rng(digit).normal(0, 50, (4, 16, 16)).astype(np.int16)
                writer.add(
                    encode_volume(
                        Volume(
                            id=str(digit) * 32,
                            series=str(digit) * 32,
                            patient="a" * 32,
                            hu=hu,
                            spacing_mm=(1.0, 1.0, 1.0),
                            z_positions_mm=(0.0, 1.0, 2.0, 3.0),
                            orientation=AXIAL,
                        )
                    )
                )
            summaries.append(writer.finish())
    manifest = build_manifest(
        summaries,
        sides={str(digit) * 32: "train" for digit in range(6)},
        options={},
        rejected_by_code={},
        config_digest="c",
        leaks=[],
        packer="tests",
        sources={},
        previous=None,
    )
    commit_set(tmp_path, manifest)
    return tmp_path


def damaged_volumes(folder: Path) -> list[str]:
    return [damage.volume[0] for damage in verify_set(folder) if damage.volume]


def run(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/verify_shards.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)


def test_the_command(folder: Path, repository: Path) -> None:
    whole = run(repository, folder)
    assert (whole.returncode, whole.stdout.split(":")[0]) == (0, "whole")
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x28\xb5\x2f\xfd") + 40] ^= 1
    path.write_bytes(data)
    damaged = run(repository, folder)
    assert damaged.returncode == 1
    assert f"shard-000001.tar: volume {'3' * 32}: slice 0" in damaged.stdout
    assert damaged.stdout.count("volume ") == 1
    assert run(repository, folder / "absent").returncode == 2
    assert run(repository, folder, "--threads", 0).returncode == 2
    assert "damaged" in run(repository, "--help").stdout
    (folder / "manifest.json").unlink()
    missing = run(repository, folder)
    assert (missing.returncode, missing.stdout.split(":")[0]) == (1, "manifest.json")


def test_against_its_source(
    tmp_path: Path,
    pools: Pools,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)
    monkeypatch.setattr("dinox_io.against.WorkerPool", pools.lend)
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source / "SMITH", 4, series="1.7.1", patient="SMITH")
    write_series(source / "DOE", 4, series="1.7.2", patient="DOE")
    pack(PackSettings(inputs=(source,), output=out), ProgressReport(io.StringIO()))

    def code(*arguments: object) -> int:
        return verify_shards.main([str(out), "--workers", "1", *map(str, arguments)])

    assert code("--against", source) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 of 2 volumes are bit for bit their source, 0 differ")
    assert code("--against", source / "DOE") == 1
    said = "".join(capsys.readouterr())
    assert "not verified, its source is not in INPUT" in said
    assert not any(word in said for word in ("SMITH", "DOE", "1.7.", "Jane"))
    assert code("--against", tmp_path / "absent") == 2
    for wrong in (("--key-file", source), ("--against", source, "--workers", 0)):
        with pytest.raises(SystemExit) as end:
            code(*wrong)
        assert end.value.code == 2
    (out / "private" / "key").unlink()
    assert code("--against", source) == 2
    assert "--key-file" in capsys.readouterr().err
    shard = out / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    (out / "manifest.json").write_bytes(b"{}")
    assert code("--against", source) == 1


@pytest.mark.parametrize("index", [True, False])
def test_every_volume_that_a_flipped_bit_touches_is_named(folder: Path, index: bool) -> None:
    if not index:
        (folder / "index.msgpack").unlink()
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    begins = [data.index(f"{digit}".encode() * 32 + b".json") for digit in range(3)] + [len(data) - 1024]
    for offset in np.random.default_rng(0).integers(0, len(data), 120).tolist():
        damaged = bytearray(data)
        damaged[offset] ^= 0x10
        path.write_bytes(damaged)
        damages = [damage for damage in verify_set(folder) if damage.file == path.name]
        assert damages, f"a flip at byte {offset} was not found"
        touched = sum(offset >= begin for begin in begins) - 1
        named = {damage.volume for damage in damages if damage.volume}
        if 0 <= touched < 3:
            assert f"{touched}" * 32 in named
            if index:
                assert len(named) == 1


def test_a_cut_shard(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"1" * 32 + b".hu16.zst") + 700])
    assert damaged_volumes(folder) == ["1", "2"]
    path.unlink()
    assert damaged_volumes(folder) == ["0", "1", "2"]


def test_damage_outside_of_volumes(folder: Path) -> None:
    with (folder / "shard-000001.tar").open("ab") as file:
        file.write(bytes(512))
    (folder / "manifests" / "old.json").write_bytes(canonical_json({"self": "x"}))
    (folder / "index.msgpack").write_bytes(b"")
    found = {damage.file: damage.volume for damage in verify_set(folder)}
    assert found == {"shard-000001.tar": None, "manifests/old.json": None, "index.msgpack": None}


@pytest.mark.parametrize("failure", [errno.EIO, errno.ESTALE])
def test_bytes_that_cannot_be_read_are_named_and_the_rest_is_verified(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    with open_shards(folder) as shards:
        row = int(np.searchsorted(shards._index.first, 5, side="right")) - 1
        bad = int(
            shards._index.frames(row, 5 - int(shards._index.first[row]), 6)[0]
        )  # the second slice of the second volume of the first shard
    shard, read = (folder / "shard-000000.tar").stat(), os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.fstat(descriptor).st_ino == shard.st_ino and offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(failure, os.strerror(failure))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr("dinox_io.storage.os.preadv", preadv)
    reason = f"cannot be read ({os.strerror(failure)})"
    assert [str(damage) for damage in verify_set(folder)] == [
        f"shard-000000.tar: volume {'1' * 32}: slice 1: byte {bad} {reason}"
    ]
    bad = shard.st_size - END_BYTES  # of no volume: met only when the whole file is hashed, from its first byte on
    assert [str(damage) for damage in verify_set(folder)] == [f"shard-000000.tar: byte 0 {reason}"]


def test_a_shard_both_flipped_and_cut_is_named_for_both(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x28\xb5\x2f\xfd") + 40] ^= 1
    path.write_bytes(data[:-512])
    said = [(damage.volume, damage.problem.split(":")[0]) for damage in verify_set(folder)]
    assert said == [("0" * 32, "slice 0"), (None, f"it has {len(data) - 512} bytes instead of {len(data)}")]


def test_a_folder_that_is_no_set_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        verify_shards.main([str(tmp_path)])
    assert end.value.code == 2
    assert "is not a set of shards" in capsys.readouterr().err


def test_ctrl_c_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinox_io.verify._verify_shard", interrupt)
    assert verify_shards.main([str(folder), "--threads", "1"]) == 130
    assert "verify_shards: interrupted" in capsys.readouterr().err.splitlines()[-1]
