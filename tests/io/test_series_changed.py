"""A series of the set is compared in all that the set has of it; one that changed changes nothing of the set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from dinox_io import task
from dinox_io.privacy import pseudonym
from dinox_io.volume import Rejection, Volume
from tests.io.dicom_factory import write_series
from tests.io.small_packs import KEY, contents, packed, packed_in_parts, patients, same_process  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("same_process")

FIRST, SECOND = (pseudonym(KEY, "patient", f"P{number}\0") for number in (1, 2))


def change_files(folder: Path, change: Callable[[Dataset], None]) -> None:
    for path in folder.glob("*.dcm"):
        dataset = dcmread(path)
        change(dataset)
        dataset.save_as(path)


def rows(out: Path, name: str = "rejected.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def others(out: Path) -> dict[str, bytes]:
    """All of a set but what tells of the input, and the manifest, which counts it."""
    told = ("rejected.jsonl", "private/sources.jsonl", "manifest.json", "manifests/")
    return {name: data for name, data in contents(out).items() if not name.startswith(told)}


def set_patient(dataset: Dataset) -> None:
    dataset.PatientID = "P2"


def set_spacing(dataset: Dataset) -> None:
    dataset.PixelSpacing = [0.5, 0.7]


def set_steps(dataset: Dataset) -> None:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, 2 * z]


def set_heights(dataset: Dataset) -> None:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, z + 100]


def set_directions(dataset: Dataset) -> None:
    dataset.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]


def set_modality(dataset: Dataset) -> None:
    dataset.Modality = "MR"


def set_one_patient(dataset: Dataset) -> None:
    if dataset.InstanceNumber == 1:
        dataset.PatientID = "P2"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_patient, "of another patient"),
        (set_spacing, "other geometry"),
        (set_steps, "other geometry"),
        (set_heights, "other geometry"),
        (set_directions, "other geometry"),
        (set_modality, "now NOT_CT"),
        (set_one_patient, "now MIXED_PATIENTS"),
    ],
)
def test_equal_voxels_are_not_enough(tmp_path: Path, change: Callable[[Dataset], None], told: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source, 4)
    change_files(source, lambda dataset: None)
    packed(source, out)
    before = others(out)
    (row,) = rows(out, "private/sources.jsonl")
    assert row["patient"] == FIRST
    change_files(source, change)
    report = packed(source, out)
    assert (report.exit_code, report.new_volumes) == (3, 0)
    (refused,) = rows(out)
    assert (refused["code"], refused["files"]) == ("SERIES_CHANGED", 4)
    assert f": {told};" in refused["reason"]
    assert others(out) == before
    (after,) = rows(out, "private/sources.jsonl")
    assert {**after, "files": 0} == {**row, "files": 0}
    assert [path for path, _ in after["files"]] == [path for path, _ in row["files"]]


@pytest.mark.parametrize("code", ["TOO_FEW_SLICES", "SLICE_GAP", "FILES_DAMAGED"])
def test_a_changed_series_that_no_longer_reads_is_refused_as_changed(tmp_path: Path, code: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    paths = write_series(source, 6)
    packed(source, out)
    before = others(out)
    if code == "FILES_DAMAGED":  # its header ends behind SeriesInstanceUID
        data = paths[1].read_bytes()
        paths[1].write_bytes(data[: data.index(b"1.2.3.4\0", 400) + 20])
    else:
        for path in paths[1:2] if code == "SLICE_GAP" else paths[1:5]:
            path.unlink()
    assert packed(source, out).exit_code == 3
    (refused,) = [row for row in rows(out) if row["series"]]
    assert refused["code"] == "SERIES_CHANGED"
    assert f"now {code};" in refused["reason"]
    assert others(out) == before


def test_what_says_nothing_of_the_series_keeps_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source, 4)
    packed(source, out)

    def failing(*_: object, **__: object) -> tuple[list[Volume], list[Rejection]]:
        raise OSError

    monkeypatch.setattr(task, "READERS", {"dicom": failing})
    change_files(source, set_patient)
    assert packed(source, out).exit_code == 3
    assert [row["code"] for row in rows(out)] == ["FILE_UNREADABLE"]
    assert rows(out, "private/sources.jsonl")[0]["patient"] == FIRST


def test_without_its_index_a_set_knows_as_much(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source, 4)
    packed(source, out)
    (out / "index.msgpack").unlink()
    assert packed(source, out).exit_code == 0
    (out / "index.msgpack").write_bytes(b"damaged")
    change_files(source, set_heights)
    assert packed(source, out).exit_code == 3


def test_parts_of_a_changed_series_leave_its_row_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_series(source, 4)
    packed(source, out)
    change_files(source, set_patient)
    report = packed_in_parts(source, out, 2)
    assert [row["code"] for row in report.rejected] == ["SERIES_CHANGED"]
    assert rows(out, "private/sources.jsonl")[0]["patient"] == FIRST
    assert SECOND.encode() not in b"".join(contents(out).values())


def test_a_run_that_adds_nothing_keeps_the_options_of_the_set(tmp_path: Path) -> None:
    source, out = patients(tmp_path / "in", 3), tmp_path / "out"
    packed(source, out)
    before = contents(out)
    options = {"preset": "fast", "shard_bytes": 1 << 20}
    packed(source, out, **options)
    packed_in_parts(source, out, 2, **options)
    assert contents(out) == {**before, **{name: contents(out)[name] for name in contents(out) if "merged" in name}}
    write_series(source / "s9", 2, series="1.99", patient="P9")
    packed(source, out, **options, about={"name": "n", "licence": "l", "weights_may_be_released": "no"})
    old, new = json.loads(before["manifest.json"]), json.loads(contents(out)["manifest.json"])
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"about", "previous", "rejected", "sources", "self"}
    write_series(source / "s9", 4, series="1.99", patient="P9")
    packed(source, out, **options)
    grown = json.loads(contents(out)["manifest.json"])
    assert (grown["options"]["filter"], grown["options"]["level"]) == ("hilp", -1)
    assert grown["config_digest"] != old["config_digest"]
