"""Whose a NIfTI file is: common layouts, what the user says, what is warned of, equal files of two patients."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from dinox_io.against import compare_with_source
from dinox_io.discover import FoundSeries, Grouper, scan, walk
from dinox_io.nifti_patient import PatientPattern, patient_by_path
from dinox_io.output import PackError
from dinox_io.privacy import pseudonym
from dinox_io.progress import ProgressReport
from dinox_io.report import PackReport
from dinox_io.settings import PackSettings
from tests.io.dicom_factory import expected_hu
from tests.io.nifti_factory import as_dcm2niix, dcm2niix_affine, write_nifti
from tests.io.small_packs import packed, same_process

__all__ = ["same_process"]  # a fixture
pytest.importorskip("nibabel", reason="needs the extra dinox[nifti]")
KEY = b"0123456789abcdef"


def scan_of(path: Path, number: int = 0) -> Path:
    hu = expected_hu(5) + number
    return write_nifti(path, as_dcm2niix(hu), dcm2niix_affine((5, 10, 14), (1.0, 0.7, 0.9), (-10.0, -20.0, 0.0)))


def series_of(folder: Path) -> list[FoundSeries]:
    grouper = Grouper(KEY)
    for scanned in scan(list(walk([folder], without=Path("/nowhere")))):
        grouper.add(scanned)
    assert grouper.foreign == []
    return grouper.result()


@pytest.mark.parametrize(
    ("path", "name", "origin"),
    [
        ("sub-01/ses-2/ct/sub-01_ses-2_ct.nii.gz", "01", "BIDS subject"),
        ("s1/sub-07_ct.nii.gz", "07", "BIDS subject"),
        ("s0004/ct.nii.gz", "s0004", "folder"),
        ("A/B/ct.nii", "A", "folder"),
        ("lung_001.nii.gz", "lung_001", "file name"),
        ("odd name", "odd name", "file name"),
        ("imagesTr/lung_001.nii.gz", "lung_001", "file name"),
        ("Task06_Lung/labelsTr/lung_001.nii.gz", "lung_001", "file name"),
        ("Dataset001/imagesTs/case_07_0000.nii.gz", "case_07", "file name"),
        ("Dataset001/imagesTr/case_07_0001.nii.gz", "case_07", "file name"),
        ("amos22/imagesVa/amos_0013.nii.gz", "amos_0013", "file name"),
        ("P1/images/case_07_0000.nii.gz", "P1", "folder"),
        ("imagesTr/sub-9_0000.nii.gz", "9", "BIDS subject"),
    ],
)
def test_whose_it_is(tmp_path: Path, path: str, name: str, origin: str) -> None:
    scan_of(tmp_path / "in" / path)
    (series,) = series_of(tmp_path / "in")
    assert series.patient == pseudonym(KEY, "patient", f"{name}\0")  # as of a DICOM PatientID of that name
    assert (series.patient_from, series.format) == (origin, "nifti")


@pytest.mark.parametrize("top", ["/d", "/d/", "/d/imagesTr", "/d/imagesTr/case_1_0000.nii.gz"])
def test_a_case_is_that_case_from_whatever_input(top: str) -> None:
    assert patient_by_path("/d/imagesTr/case_1_0000.nii.gz", top) == ("case_1", "file name")


def patients(report: PackReport) -> set[str]:
    assert report.manifest is not None
    return {volume["patient"] for volume in report.manifest["volumes"]}


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("folder", "count"), [("imagesTr", 6), ("scans", 1)])
def test_files_of_one_folder_that_become_one_patient_are_told_of(tmp_path: Path, folder: str, count: int) -> None:
    for number in range(6):
        scan_of(tmp_path / "in" / folder / f"case_{number}.nii.gz", number)
    report = packed(tmp_path / "in", tmp_path / "out")
    assert len(patients(report)) == count
    said = "6 NIfTI files in 1 folder count as 1 patient (give --nifti-patient REGEX to say otherwise)."
    assert (said in report.lines("out")) == (count == 1)


@pytest.mark.usefixtures("same_process")
def test_a_file_in_each_folder_is_nothing_to_tell_of(tmp_path: Path) -> None:
    for number in range(3):
        scan_of(tmp_path / f"in/s{number}/ct.nii", number)
    report = packed(tmp_path / "in", tmp_path / "out")
    assert (len(patients(report)), report.by_folder) == (3, (0, 0))
    for number in range(2):
        scan_of(tmp_path / f"in/s{number}/again.nii", 10 + number)
    report = packed(tmp_path / "in", tmp_path / "out")
    assert (len(patients(report)), report.by_folder) == (3, (4, 2))
    assert any(line.startswith("4 NIfTI files in 2 folders count as 2 patients") for line in report.lines("out"))


@pytest.mark.usefixtures("same_process")
def test_the_user_says_whose_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        scan_of(tmp_path / f"in/scans/Doe{number // 2}_{number}.nii.gz", number)
    pattern = r"scans/(Doe\d)_"
    report = packed(tmp_path / "in", tmp_path / "out", nifti_patient=pattern)
    key = (tmp_path / "key").read_bytes()
    assert patients(report) == {pseudonym(key, "patient", f"Doe{number}\0") for number in range(2)}
    assert report.manifest is not None
    assert report.manifest["options"]["nifti_patient"] is True
    assert report.by_folder == (0, 0)
    public = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.parent.name != "private"]
    assert not any(b"Doe" in path.read_bytes() for path in public)
    again = packed(tmp_path / "in", tmp_path / "out", nifti_patient=pattern)
    assert (again.new_volumes, again.in_set) == (0, 4)
    options: dict[str, Any] = {"key_file": tmp_path / "key", "progress": ProgressReport(io.StringIO())}
    compared = compare_with_source(tmp_path / "out", [tmp_path / "in"], nifti_patient=pattern, **options)
    assert (len(compared.equal), compared.different) == (4, [])


@pytest.mark.usefixtures("same_process")
def test_a_pattern_must_name_every_files_patient(tmp_path: Path) -> None:
    for number, name in enumerate(["a1", "a2", "b1"]):
        scan_of(tmp_path / f"in/{name}.nii", number)
    with pytest.raises(PackError, match="no patient for 1 of 3 NIfTI files"):
        packed(tmp_path / "in", tmp_path / "out", nifti_patient="(a.)")
    with pytest.raises(PackError, match="no patient for 2 of 3 NIfTI files"):
        packed(tmp_path / "in", tmp_path / "out", nifti_patient="(b1)?")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(("pattern", "said"), [("(a", "no regular expression"), ("a", "no group")])
def test_a_pattern_that_cannot_name_anyone_is_a_usage_error(tmp_path: Path, pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PatientPattern(pattern)
    with pytest.raises(PackError, match=f"--nifti-patient: .*{said}"):
        PackSettings(inputs=(tmp_path,), output=tmp_path / "out", nifti_patient=pattern).check()


@pytest.mark.usefixtures("same_process")
def test_one_file_under_two_patients_is_two_series_and_a_leak(tmp_path: Path) -> None:
    for number in range(12):  # enough for both sides, whatever the key
        shutil.copy(scan_of(tmp_path / "one.nii"), folder(tmp_path / f"in/p{number}") / "a.nii")
    shutil.copy(tmp_path / "one.nii", tmp_path / "in/p0/copy.nii")
    report = packed(tmp_path / "in", tmp_path / "out", val_fraction=0.5)
    assert report.manifest is not None
    volumes = report.manifest["volumes"]
    assert (len(volumes), len(patients(report)), report.exit_code) == (12, 12, 0)
    assert {volume["split"] for volume in volumes} == {"none"}
    assert [len(leak["volumes"]) for leak in report.manifest["leaks"]] == [12]
    assert [(row["code"], row["files"]) for row in report.rejected] == [("DUPLICATE_DROPPED", 1)]


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path
