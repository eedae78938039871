"""Walking and grouping: each file once, in an order of names, series by UID or by likeness."""

import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dinox_io import dicom
from dinox_io.discover import FoundFile, FoundSeries, Grouper, ScannedFile, scan, walk
from dinox_io.formats import READERS
from dinox_io.privacy import pseudonym
from dinox_io.rules import verdict
from dinox_io.series import SeriesRules
from tests.io.dicom_factory import set_pixels, slice_dataset, stored_slice, write, write_series

KEY = b"0123456789abcdef"


def names(*inputs: Path, without: Path = Path("/nowhere")) -> list[str]:
    return [Path(file.path).name for file in walk(inputs, without=without)]


def group(*inputs: Path) -> tuple[list[FoundSeries], list[tuple[str, str]]]:
    grouper = Grouper(KEY)
    for scanned in scan(list(walk(inputs, without=Path("/nowhere")))):
        grouper.add(scanned)
    return grouper.result(), sorted((code, Path(file.path).name) for code, file in grouper.foreign)


def touch(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_files_come_sorted_and_with_their_size(tmp_path: Path) -> None:
    touch(tmp_path, "b/2", "a", "b/1", "c/x/y", ".hidden")
    assert names(tmp_path) == [".hidden", "a", "1", "2", "y"]
    assert {file.size for file in walk([tmp_path / "a"], without=tmp_path / "none")} == {1}


def test_overlapping_inputs_and_loops_give_each_file_once(tmp_path: Path) -> None:
    touch(tmp_path, "a/1", "a/b/2")
    (tmp_path / "a/b/loop").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    (tmp_path / "a/link").symlink_to(tmp_path / "a/1")
    (tmp_path / "a/hard").hardlink_to(tmp_path / "a/b/2")
    found = list(walk([tmp_path / "a", tmp_path, tmp_path / "a/b"], without=tmp_path / "none"))
    assert sum(file.size >= 0 for file in found) == 2
    assert [Path(file.path).name for file in found if file.size < 0] == ["self"]


def test_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "far/1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/folder").symlink_to(tmp_path / "far", target_is_directory=True)
    assert names(tmp_path / "in") == ["1"]


def test_the_output_and_special_files_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "1", "out/shard.tar")
    os.mkfifo(tmp_path / "pipe")
    assert names(tmp_path, without=tmp_path / "out") == ["1"]


def test_series_are_grouped_by_uid_not_by_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "a", 2, series="1.1")
    write_series(tmp_path / "b", 3, series="1.2")
    shutil.move(tmp_path / "b/002.dcm", tmp_path / "a/odd name #ä")
    found, foreign = group(tmp_path)
    assert {series.series: len(series.files) for series in found} == {
        pseudonym(KEY, "series", "1.1"): 2,
        pseudonym(KEY, "series", "1.2"): 3,
    }
    assert {series.patient for series in found} == {pseudonym(KEY, "patient", "P1\0")}
    assert foreign == []


def test_foreign_files_are_listed_by_code(tmp_path: Path) -> None:
    touch(tmp_path, ".DS_Store", "notes.txt", "x.dcm")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert group(tmp_path)[1] == [
        ("FILE_UNREADABLE", "gone"), ("NOT_DICOM", ".DS_Store"), ("NOT_DICOM", "notes.txt"), ("NOT_DICOM", "x.dcm"),
    ]  # fmt: skip


def without_uid(index: int, dataset: Dataset) -> None:
    dataset.SeriesInstanceUID = ""


def test_series_without_a_uid_are_told_apart_and_keep_their_name_when_moved(tmp_path: Path) -> None:
    write_series(tmp_path / "a", 3, change=without_uid)
    other = slice_dataset(9)
    without_uid(9, other)
    set_pixels(other, stored_slice(9, 5, 5))
    write(other, tmp_path / "a/other.dcm")
    found, _ = group(tmp_path)
    assert sorted(len(series.files) for series in found) == [1, 3]
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert {series.series for series in group(tmp_path / "moved")[0]} == {series.series for series in found}
    both, _ = group(tmp_path)
    assert sorted(len(series.files) for series in both) == [2, 6]


@pytest.mark.parametrize(("patient", "study", "groups"), [("P1", "1.2", 1), ("P1", "", 1), ("", "1.2", 1), ("", "", 2)])
def test_folders_part_series_without_a_uid_only_where_nothing_else_can(
    tmp_path: Path, patient: str, study: str, groups: int
) -> None:
    def nameless(index: int, dataset: Dataset) -> None:
        without_uid(index, dataset)
        dataset.PatientID, dataset.StudyInstanceUID = patient, study

    for number, path in enumerate(write_series(tmp_path / "all", 4, change=nameless)):
        target = tmp_path / "in" / str(number % 2) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    found, _ = group(tmp_path / "in")
    assert sorted(len(series.files) for series in found) == [4 // groups] * groups


def test_a_broken_link_is_said_to_be_possible(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert group(tmp_path) == ([], [("FILE_UNREADABLE", "gone")])
    assert "a link whose target is gone" in verdict("FILE_UNREADABLE", series=None, files=1).hint


@pytest.mark.parametrize(
    ("patient_id", "issuer", "study", "value", "origin"),
    [
        ("P7", "HOSP", "1.2", "P7\0HOSP", "PatientID"),
        ("P7 ", "", "1.2", "P7\0", "PatientID"),
        ("", "HOSP", "1.2", "1.2", "StudyInstanceUID"),
        ("", "", "", "1.2.3.4", "SeriesInstanceUID"),
    ],
)
def test_the_patient_is_named_as_documented(
    tmp_path: Path, patient_id: str, issuer: str, study: str, value: str, origin: str
) -> None:
    dataset = slice_dataset(0)
    dataset.PatientID, dataset.IssuerOfPatientID, dataset.StudyInstanceUID = patient_id, issuer, study
    write(dataset, tmp_path / "1.dcm")
    (series,), _ = group(tmp_path)
    assert series.patient == pseudonym(KEY, "patient", value)
    assert series.patient_from == origin


def test_two_patients_under_one_series_are_seen(tmp_path: Path) -> None:
    write_series(tmp_path / "a", 2, patient="P1")
    write_series(tmp_path / "b", 2, patient="P2")
    (series,), _ = group(tmp_path)
    assert series.identities == {("P1", ""), ("P2", "")}


def test_what_is_no_ct_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_series(tmp_path / "other", 3, series="1.1", change=lambda _, one: setattr(one, "Modality", "SEG"))
    mixed = write_series(tmp_path / "mixed", 3, series="1.2")
    dataset = slice_dataset(3, series="1.2")
    dataset.Modality = "SR"
    mixed.append(write(dataset, tmp_path / "mixed/report"))
    found, _ = group(tmp_path)
    opened: list[str] = []
    real = dicom.open_binary
    monkeypatch.setattr(dicom, "open_binary", lambda path, **named: (opened.append(str(path)), real(path, **named))[1])
    codes = {}
    for series in found:
        paths = [Path(file.path) for file in series.files]
        _, rows = READERS[series.format](paths, series=series.series, patient=series.patient, rules=SeriesRules())
        codes[series.series] = [(row.code, row.files) for row in rows]
    assert codes[pseudonym(KEY, "series", "1.1")] == [("NOT_CT", len(other))]
    assert codes[pseudonym(KEY, "series", "1.2")] == [("MIXED_SERIES", len(mixed))]
    assert sorted(opened) == sorted(map(str, mixed))


def test_what_the_finder_keeps_of_a_file_is_small(tmp_path: Path) -> None:
    """A download has 250,000 files and more: their headers must not stay in memory."""
    identity = scan(list(walk(write_series(tmp_path, 1), without=tmp_path / "none")))[0].identity
    assert identity is not None
    grouper, count = Grouper(KEY), 4_000
    tracemalloc.start()
    for number in range(count):
        one = replace(identity, series_uid=f"1.2.{number // 10}", patient_id=f"P{number // 100}")
        grouper.add(ScannedFile(FoundFile(f"{tmp_path}/{number:06d}.dcm", 500_000 + number, "top"), one, None))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(grouper.result()) == count // 10
    assert held / count < 500
