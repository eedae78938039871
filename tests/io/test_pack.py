"""From files to a set: what stands where, growing, changes, leaks, damage; all through the real worker processes."""

import io
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dinox_io import open_shards
from dinox_io.hounsfield import volume_digest
from dinox_io.output import OutputFolder, PackError
from dinox_io.pack import PackSettings, pack
from dinox_io.privacy import pseudonym
from dinox_io.progress import ProgressReport
from dinox_io.report import PackReport
from dinox_io.series import SeriesRules
from tests.io.dicom_factory import expected_hu, set_pixels, slice_dataset, stored_slice, write, write_series
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)

KEY = b"a key of the tests"


def run(source: Path | list[Path], out: Path, **options: Any) -> PackReport:
    """Pack with the tests' key."""
    key = out.parent / "key"
    key.write_bytes(KEY)
    inputs = tuple(source) if isinstance(source, list) else (source,)
    settings = PackSettings(inputs=inputs, output=out, key_file=key, **options)
    return pack(settings, ProgressReport(io.StringIO()))


@pytest.fixture(autouse=True)
def kept_workers(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The processes are real, but outlive a pack: starting them anew for each would take most of the time."""
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the lock, by its name."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def four_patients(folder: Path) -> Path:
    """Four series of four patients, a localizer, an MR and junk."""
    for number in range(4):
        write_series(
            folder / f"s{number}", 4 + number, series=f"1.7.{number}", patient=f"P{number}",
            change=lambda index, dataset, seed=100 * number: set_pixels(dataset, stored_slice(index + seed, 40, 30)),
        )  # fmt: skip
    write_series(folder / "mr", 2, series="1.8", change=lambda _, dataset: setattr(dataset, "Modality", "MR"))
    (folder / "readme.txt").write_text("nothing")
    return folder


def test_a_pack_is_what_the_format_says(tmp_path: Path) -> None:
    source = four_patients(tmp_path / "in")
    report = run(source, tmp_path / "out", workers=2, shard_bytes=42_000)
    out = tmp_path / "out"
    assert report.exit_code == 0
    assert (report.new_volumes, len(report.manifest["shards"])) == (4, 2)  # type: ignore[index]
    with open_shards(out) as shards:
        assert {volume.id for volume in shards.volumes} == {pseudonym(KEY, "series", f"1.7.{n}") for n in range(4)}
        for volume in shards.volumes:
            number = next(n for n in range(4) if volume.id == pseudonym(KEY, "series", f"1.7.{n}"))
            stored = np.stack([stored_slice(index + 100 * number, 40, 30) for index in range(4 + number)])
            hu = stored.astype(np.int16) - np.int16(1024)
            assert np.array_equal(shards.read(volume, 0, volume.shape[0]), hu)
            assert volume.digest == volume_digest(hu)
            assert volume.patient == pseudonym(KEY, "patient", f"P{number}\0")
            assert volume.spacing_mm == (1.0, 0.7, 0.9)
    assert {(row["code"], row["series"], row["files"]) for row in rows(out)} == {
        ("NOT_CT", pseudonym(KEY, "series", "1.8"), 2),
        ("NOT_DICOM", None, 1),
    }
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((out / "private/sources.jsonl").stat().st_mode) == 0o600
    assert not (out / "private/key").exists()
    sources = [json.loads(line) for line in (out / "private/sources.jsonl").read_text().splitlines()]
    assert sum(len(row["files"]) for row in sources) == 4 + 5 + 6 + 7 + 2 + 1
    assert {row["series_uid"] for row in sources if "series" in row} == {"1.8", *(f"1.7.{n}" for n in range(4))}


def test_bytes_depend_on_neither_workers_nor_names_nor_a_second_run(tmp_path: Path) -> None:
    source = four_patients(tmp_path / "in")
    run(source, tmp_path / "one", workers=1)
    run([source / "s2", source], tmp_path / "two", workers=2)
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    again = run(source, tmp_path / "one", workers=2)
    assert (again.exit_code, again.new_volumes) == (0, 0)
    assert contents(tmp_path / "one") == first
    shutil.copytree(source, tmp_path / "other")
    for index, path in enumerate(sorted((tmp_path / "other/s3").iterdir())):
        path.rename(path.with_name(f"x{(index * 5) % 7}"))
    run(tmp_path / "other", tmp_path / "three", workers=2)
    third = contents(tmp_path / "three")
    for private in ("private/sources.jsonl",):  # holds the paths
        first.pop(private)
        third.pop(private)
    assert first == third


def test_a_set_grows_by_new_shards_only(tmp_path: Path) -> None:
    source, out = four_patients(tmp_path / "in"), tmp_path / "out"
    run(source / "s0", out)
    before = contents(out)
    old_digest = json.loads(before["manifest.json"])["self"]
    report = run(source, out, workers=2)
    after = contents(out)
    assert (report.exit_code, report.new_volumes) == (0, 3)
    assert after["shard-000000.tar"] == before["shard-000000.tar"]
    assert after[f"manifests/{old_digest}.json"] == before["manifest.json"]
    run(source, tmp_path / "at_once")
    with open_shards(out) as grown, open_shards(tmp_path / "at_once") as whole:
        assert [(v.id, v.digest, v.split) for v in grown.volumes] == [(v.id, v.digest, v.split) for v in whole.volumes]
    assert rows(out) == rows(tmp_path / "at_once")


def test_a_series_that_changed_is_rejected_and_the_set_keeps_what_it_had(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source, 4)
    run(source, out)
    before = contents(out)
    write(slice_dataset(4), source / "later.dcm")
    report = run(source, out)
    assert report.exit_code == 3
    assert [row["code"] for row in rows(out)] == ["SERIES_CHANGED"]
    assert contents(out)["shard-000000.tar"] == before["shard-000000.tar"]
    with open_shards(out) as shards:
        assert shards.volumes[0].shape[0] == 4
    (source / "later.dcm").unlink()
    assert run(source, out).exit_code == 0
    assert rows(out) == []


def test_exit_codes_tell_some_from_all(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_series(source / "good", 4, series="1.1")
    write_series(source / "short", 2, series="1.2")
    assert run(source, tmp_path / "a").exit_code == 3
    assert run(source, tmp_path / "a").exit_code == 3
    none = run(source / "short", tmp_path / "b")
    assert none.exit_code == 1
    assert none.manifest is None
    assert none.lines("OUT")[-1] == "There is no set in OUT: no volume was packed, and no manifest.json written."
    assert [row["code"] for row in rows(tmp_path / "b")] == ["TOO_FEW_SLICES"]
    assert not (tmp_path / "b/manifest.json").exists()
    assert run(source / "short", tmp_path / "b", rules=SeriesRules(min_slices=2)).exit_code == 0
    assert rows(tmp_path / "b") == []


def test_mixed_patients_and_damaged_headers_are_rejected(tmp_path: Path) -> None:
    write_series(tmp_path / "in/a", 3, patient="P1")
    for path in write_series(tmp_path / "in/b", 3, patient="P2"):
        path.rename(path.with_name("b" + path.name))
    bad = bytearray((tmp_path / "in/a/000.dcm").read_bytes())
    bad[136:138] = b"\0\1"
    (tmp_path / "in/bad").write_bytes(bad)
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.exit_code == 1
    assert [(row["code"], row["files"]) for row in rows(tmp_path / "out")] == [
        ("DICOM_DAMAGED", 1),
        ("MIXED_PATIENTS", 6),
    ]


def test_identical_volumes_of_patients_on_two_sides_belong_to_none(tmp_path: Path) -> None:
    for number in range(8):
        write_series(tmp_path / f"in/{number}", 3, series=f"1.{number}", patient=f"P{number}")
    write_series(tmp_path / "in/8", 4, series="1.8", patient="P8")
    report = run(tmp_path / "in", tmp_path / "out", val_fraction=0.5)
    manifest = report.manifest
    assert manifest is not None
    leaked = [volume for volume in manifest["volumes"] if volume["shape"][0] == 3]
    assert {volume["split"] for volume in leaked} == {"none"}
    assert manifest["leaks"] == [
        {
            "digest": volume_digest(expected_hu(3)),
            "sides": ["train", "val"],
            "volumes": sorted(volume["id"] for volume in leaked),
        }
    ]
    assert {volume["split"] for volume in manifest["volumes"]} - {"none"} <= {"train", "val"}


def test_split_runs_are_volumes_of_their_own(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 9)
    (tmp_path / "in/004.dcm").unlink()
    assert run(tmp_path / "in", tmp_path / "out").exit_code == 1
    report = run(tmp_path / "in", tmp_path / "out", rules=SeriesRules(split_gaps=True))
    assert report.exit_code == 0
    name = pseudonym(KEY, "series", "1.2.3.4")
    with open_shards(tmp_path / "out") as shards:
        assert [volume.id for volume in shards.volumes] == [f"{name}-1", f"{name}-2"]
        assert {volume.series for volume in shards.volumes} == {name}
    assert [row["code"] for row in rows(tmp_path / "out")] == ["SPLIT_AT_GAPS"]
    assert run(tmp_path / "in", tmp_path / "out", rules=SeriesRules(split_gaps=True)).new_volumes == 0


def test_a_volume_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    source = four_patients(tmp_path / "in")
    report = run(source, tmp_path / "out", shard_bytes=1)
    assert report.manifest is not None
    assert [len(shard["volumes"]) for shard in report.manifest["shards"]] == [1, 1, 1, 1]


def test_the_record_keeps_what_was_done(tmp_path: Path) -> None:
    def change(_: int, dataset: Dataset) -> None:
        dataset.PatientID = ""
        dataset.RescaleSlope = "20"

    write_series(tmp_path / "in", 3, change=change)
    run(tmp_path / "in", tmp_path / "out")
    raw = (tmp_path / "out/shard-000000.tar").read_bytes()
    start = raw.index(b'{"burned_in"')
    record = json.JSONDecoder().raw_decode(raw[start : start + 8192].decode("utf-8", "ignore"))[0]
    assert record["patient_from"] == "StudyInstanceUID"
    assert record["saturated_voxels"] > 0
    assert record["patient"] == pseudonym(KEY, "patient", "1.2.3")


# ---------------------------------------------------------------------------------------------- refusals


def test_another_key_or_split_is_refused_on_a_set_that_exists(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(PackError, match="--val-fraction"):
        run(tmp_path / "in", tmp_path / "out", val_fraction=0.3)
    other = PackSettings(inputs=(tmp_path / "in",), output=tmp_path / "out")
    with pytest.raises(PackError, match="key file"):
        pack(other, ProgressReport(io.StringIO()))
    (tmp_path / "key2").write_bytes(b"k" * 20)
    settings = PackSettings(inputs=(tmp_path / "in",), output=tmp_path / "out", key_file=tmp_path / "key2")
    with pytest.raises(PackError, match="another key"):
        pack(settings, ProgressReport(io.StringIO()))


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    (tmp_path / "file").write_text("x")
    (tmp_path / "short").write_bytes(b"x" * 15)
    quiet = ProgressReport(io.StringIO())
    with pytest.raises(PackError, match="there is no"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(PackError, match="below 1"):
        run(tmp_path / "in", tmp_path / "out", val_fraction=0.6, test_fraction=0.4)
    with pytest.raises(PackError, match="at least 1"):
        run(tmp_path / "in", tmp_path / "out", workers=0)
    with pytest.raises(PackError, match="needs a folder"):
        run(tmp_path / "in", tmp_path / "file")
    with pytest.raises(PackError, match="15 bytes"):
        pack(PackSettings(inputs=(tmp_path / "in",), output=tmp_path / "o", key_file=tmp_path / "short"), quiet)


def test_a_second_packer_is_refused(tmp_path: Path) -> None:  # F14
    write_series(tmp_path / "in", 3)
    with OutputFolder(tmp_path / "out").held(), pytest.raises(PackError, match="another packer"):
        run(tmp_path / "in", tmp_path / "out")
    assert run(tmp_path / "in", tmp_path / "out").exit_code == 0


def test_shards_that_nobody_lists_are_not_deleted(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out/manifest.json").rename(tmp_path / "elsewhere.json")
    before = contents(tmp_path / "out")
    with pytest.raises(PackError, match="in no manifest"):
        run(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_what_a_killed_run_left_is_cleaned_up(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    out = tmp_path / "out"
    run(tmp_path / "in", out)
    before = contents(out)
    (out / "private/packing.jsonl").write_text('{"first_shard": 1}\n')
    (out / "shard-000001.tar").write_bytes(b"left")
    (out / ".shard-000002.tar.tmp").write_bytes(b"left")
    (out / "private/.sources.jsonl.tmp").write_bytes(b"left")
    run(tmp_path / "in", out)
    assert contents(out) == before


def test_a_damaged_manifest_is_not_touched(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    run(tmp_path / "in", tmp_path / "out")
    manifest = tmp_path / "out/manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"train"', b'"valid"'))
    before = contents(tmp_path / "out")
    with pytest.raises(PackError, match="damaged"):
        run(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_set_without_all_its_shards_is_refused_before_any_work(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_series(tmp_path / "in", 3)
    run(tmp_path / "in", out)
    shard = out / "shard-000000.tar"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "short":
        shard.write_bytes(data[:-512])
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr("dinox_io.pack.walk", lambda *_, **__: pytest.fail("work was begun"))
        with pytest.raises(PackError, match=r"damaged.*shard-000000\.tar.*Restore .* another --output"):
            run(tmp_path / "in", out)
    assert contents(out) == before
    shard.write_bytes(data)
    assert run(tmp_path / "in", out).exit_code == 0


def test_a_shard_edited_in_place_is_said_when_the_set_is_committed(tmp_path: Path) -> None:
    source, out = four_patients(tmp_path / "in"), tmp_path / "out"
    run(source / "s0", out)
    shard, manifest = out / "shard-000000.tar", (out / "manifest.json").read_bytes()
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"kernel":"B30f"', b'"kernel":"B31f"', 1))
    with pytest.raises(PackError, match=r"damaged.*shard-000000\.tar: volume \w+: differs from the manifest"):
        run(source, out)
    assert (out / "manifest.json").read_bytes() == manifest
    shard.write_bytes(data)
    assert run(source, out).new_volumes == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    write_series(tmp_path / "in", 3)
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PackError, match="permissions"):
        run(tmp_path / "in", tmp_path / "closed/out")


def test_the_summary_says_what_matters(tmp_path: Path) -> None:
    source = four_patients(tmp_path / "in")
    write_series(source / "short", 2, series="1.9")
    report = run(source, tmp_path / "out")
    text = "\n".join(report.lines("OUT"))
    for part in (
        "4 new volumes",
        "4 patients",
        "22 slices",
        "Sides: train",
        "TOO_FEW_SLICES",
        "--min-slices",
        "OUT/rejected.jsonl",
    ):
        assert part in text
    assert report.lines("OUT")[-1].startswith("Next: python tools/")
