"""--against: a set is its source bit for bit, or what is not is named."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from dinox_io import open_shards
from dinox_io.against import Comparison, _spelled, compare_with_source
from dinox_io.errors import ShardError
from dinox_io.manifest import build_manifest, commit_set, read_manifest, serialize_manifest
from dinox_io.output import OutputFolder, PackError
from dinox_io.pack import PackSettings, pack
from dinox_io.privacy import pseudonym
from dinox_io.progress import ProgressReport
from dinox_io.remove import remove_patient
from dinox_io.series import SeriesRules
from dinox_io.shard import ShardWriter, encode_volume
from dinox_io.volume import Volume
from tests.io.dicom_factory import set_pixels, stored_slice, write_series
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)
from tests.io.test_manifest import resign


@pytest.fixture(autouse=True)
def kept_workers(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)
    monkeypatch.setattr("dinox_io.against.WorkerPool", pools.lend)


def pack_into(out: Path, *inputs: Path, **options: Any) -> None:
    settings = PackSettings(inputs=inputs, output=out, workers=1, **options)
    pack(settings, ProgressReport(io.StringIO()))


def compare(out: Path, *inputs: Path, **options: Any) -> Comparison:
    return compare_with_source(out, inputs, progress=ProgressReport(io.StringIO()), **options)


def name_of(out: Path, uid: str) -> str:
    return pseudonym((out / "private/key").read_bytes(), "series", uid)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three series, one with a gap, a localizer's worth of junk."""
    folder = tmp_path / "in"
    for number in range(3):
        write_series(
            folder / f"s{number}", 8, series=f"1.7.{number}", patient=f"P{number}",
            change=lambda index, dataset, seed=100 * number: set_pixels(dataset, stored_slice(index + seed, 20, 30)),
        )  # fmt: skip
    (folder / "s2" / "003.dcm").unlink()
    write_series(folder / "mr", 2, series="1.8", change=lambda _, dataset: setattr(dataset, "Modality", "MR"))
    (folder / "readme.txt").write_text("nothing")
    return folder


def test_a_set_is_its_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source)
    result = compare(out, source)
    assert (len(result.equal), result.is_whole) == (2, True)
    assert result.lines()[-1].startswith("2 of 2 volumes are bit for bit their source, 0 differ")


def test_runs_of_a_split_series_and_a_set_grown_with_other_rules(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source / "s2", rules=SeriesRules(split_gaps=True))
    pack_into(out, source / "s0")
    result = compare(out, source / "s0", source / "s2")
    assert (len(result.equal), result.is_whole) == (3, True)


def test_a_zip_of_the_source(source: Path, tmp_path: Path) -> None:
    pack_into(tmp_path / "out", source)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in source.rglob("*.dcm"):
            archive.write(path, str(path.relative_to(source)))
    assert compare(tmp_path / "out", tmp_path / "in.zip").is_whole


def test_one_changed_voxel_is_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source)
    changed = dcmread(source / "s1" / "004.dcm")
    stored = changed.pixel_array.copy()
    stored[3, 5] ^= 1
    set_pixels(changed, stored)
    changed.save_as(source / "s1" / "004.dcm")
    result = compare(out, source)
    assert result.different == [(name_of(out, "1.7.1"), "voxels that differ: 1, in slice 4 of 8")]
    assert (len(result.equal), result.is_whole) == (1, False)


def test_a_slice_less_and_a_moved_slice(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source)
    (source / "s0" / "007.dcm").unlink()
    for index in range(8):  # the same pixels 5 mm higher
        moved = dcmread(source / "s1" / f"{index:03d}.dcm")
        moved.ImagePositionPatient[2] += 5
        moved.save_as(source / "s1" / f"{index:03d}.dcm")
    problems = dict(compare(out, source).different)
    assert "shape (7, 20, 30), in the set (8, 20, 30)" in problems[name_of(out, "1.7.0")]
    assert "spacing, positions, direction or patient" in problems[name_of(out, "1.7.1")]


def test_what_has_no_source_and_what_was_not_packed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source)
    write_series(source / "new", 4, series="1.9", patient="P9")
    shutil.rmtree(source / "s0")
    result = compare(out, source)
    assert result.without_source == [name_of(out, "1.7.0")]
    assert result.not_packed == [name_of(out, "1.9")]
    assert not result.is_whole
    text = "\n".join(result.lines())
    assert "not verified, its source is not in INPUT" in text
    assert not any(word in text for word in ("P0", "P9", "1.7.", "1.9", str(source)))


def test_who_withdrew_is_not_missed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source)
    with OutputFolder(out).held() as held:
        remove_patient(held, name_of(out, "1.7.0"))
    assert compare(out, source).is_whole


def test_a_source_that_is_refused_now(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source)
    (source / "s1" / "003.dcm").unlink()
    write_series(source / "s0" / "b", 1, series="1.7.0", patient="P1")
    problems = dict(compare(out, source).different)
    assert "MISSING" in problems[name_of(out, "1.7.1")] or "GAP" in problems[name_of(out, "1.7.1")]
    assert "2 patients under one series" in problems[name_of(out, "1.7.0")]


def test_a_set_that_lies_about_its_pixels_is_found(source: Path, tmp_path: Path) -> None:
    """Every digest of the set fits, and verify_set finds nothing: only the source can tell."""
    out = tmp_path / "out"
    pack_into(out, source)
    manifest = read_manifest(out)
    with open_shards(out) as shards:
        volumes = [shards.read(record, 0, record.shape[0]) for record in shards.volumes]
        records = list(shards.volumes)
    volumes[0][2, 4, 4] += 1
    with ShardWriter(out / "shard-000000.tar", config_digest="c") as writer:
        for record, hu in zip(records, volumes, strict=True):
            writer.add(
                encode_volume(
                    Volume(
                        id=record.id, series=record.series, patient=record.patient, hu=np.ascontiguousarray(hu),
                        spacing_mm=record.spacing_mm, z_positions_mm=tuple(record.z_positions_mm.tolist()),
                        orientation=record.orientation,
                    )
                )
            )  # fmt: skip
        summary = writer.finish()
    (out / "manifest.json").unlink()
    sides = {volume["id"]: volume["split"] for volume in manifest["volumes"]}
    forged = build_manifest(
        [summary], sides=sides, options=manifest["options"], rejected_by_code={}, config_digest="c", leaks=[],
        packer="x", sources={}, previous=None,
    )  # fmt: skip
    commit_set(out, forged)
    with open_shards(out) as shards:
        assert shards.verify() == []
    assert compare(out, source).different == [(records[0].id, "voxels that differ: 1, in slice 2 of 8")]


def test_a_digest_alone_is_found_as_well(source: Path, tmp_path: Path) -> None:
    """The voxels of the shard are right and the manifest names another digest."""
    out = tmp_path / "out"
    pack_into(out, source)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["volumes"][0]["digest"] = "0" * 64
    (out / "manifest.json").write_bytes(serialize_manifest(resign(manifest)))
    result = compare(out, source)
    assert [problem for _, problem in result.different] == ["its digest is not the one that the manifest names"]


def test_the_key(source: Path, tmp_path: Path) -> None:
    out, key = tmp_path / "out", tmp_path / "key"
    key.write_bytes(b"a key of these tests")
    pack_into(out, source, key_file=key)
    with pytest.raises(ValueError, match="give the --key-file"):
        compare(out, source)
    assert compare(out, source, key_file=key).is_whole
    key.write_bytes(b"another key of these")
    with pytest.raises(ValueError, match="not the key that the set was packed with"):
        compare(out, source, key_file=key)
    key.write_bytes(b"a key of these tests")
    with pytest.raises(PackError, match="there is no"):
        compare(out, tmp_path / "absent", key_file=key)
    (out / "manifest.json").write_bytes(b"{}")
    with pytest.raises(ShardError):
        compare(out, source, key_file=key)


def test_volumes_imported_from_png_are_counted_apart(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_into(out, source)
    with open_shards(out) as shards:
        volumes = [
            Volume(
                id=record.id, series=record.series, patient=record.patient, hu=shards.read(record, 0, record.shape[0]),
                spacing_mm=record.spacing_mm, z_positions_mm=tuple(record.z_positions_mm.tolist()),
                orientation=record.orientation, facts={"source": "png16"} if number == 0 else {},
            )
            for number, record in enumerate(shards.volumes)
        ]  # fmt: skip
    manifest = read_manifest(out)
    with ShardWriter(out / "shard-000000.tar", config_digest="c") as writer:
        for volume in volumes:
            writer.add(encode_volume(volume))
        summary = writer.finish()
    (out / "manifest.json").unlink()
    sides = {volume["id"]: volume["split"] for volume in manifest["volumes"]}
    again = build_manifest(
        [summary], sides=sides, options=manifest["options"], rejected_by_code={}, config_digest="c", leaks=[],
        packer="x", sources={}, previous=None,
    )  # fmt: skip
    commit_set(out, again)
    result = compare(out, source / "mr")
    assert (result.from_png, result.without_source) == ([volumes[0].id], [volumes[1].id])
    assert f"volume {volumes[0].id}: imported from PNG: its source cannot be compared here" in result.lines()
    assert "1 imported from PNG were not compared" in result.lines()[-1]
    assert not result.is_whole
    assert Comparison(equal=["a"], from_png=["b"]).is_whole


def test_slices_are_spelled_as_runs() -> None:
    assert _spelled([4]) == "slice 4"
    assert _spelled([0, 1, 2, 7]) == "slices 0 to 2, 7"
    assert _spelled(range(0, 40, 2)) == "slices 0, 2, 4, 6, 8, 10, 12, 14 and 12 more places"
