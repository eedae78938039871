"""The phantom: same bytes for a seed, headers of a scanner, HU of a chest, noise as fitted, masks that are exact."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import make_phantom
from phantom.anatomy import render
from phantom.body import heart_distance, lung_distance
from phantom.dicom_export import stored_values
from phantom.noise import overlap_share, slice_noise, taps
from phantom.study import StudyPlan, plan_series

from dinox_io.codec import apply_filter
from dinox_io.labels import Mark, read_labels

OPTIONS = ["--patients", "4", "--slices", "10", "--size", "96", "--seed", "3"]


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "out"
    assert make_phantom.main([str(folder), *OPTIONS]) == 0
    return folder


@pytest.fixture(scope="module")
def series(study_folder: Path) -> dict[str, list[pydicom.Dataset]]:
    """Axial CT slices by series, ascending z."""
    found = defaultdict(list)
    for path in sorted((study_folder / "dicom").rglob("*")):
        data = _read(path)
        if data is not None and "AXIAL" in data.get("ImageType", []) and data.Modality == "CT":
            found[data.SeriesInstanceUID].append(data)
    return {uid: sorted(slices, key=lambda d: d.ImagePositionPatient[2]) for uid, slices in found.items()}


def _read(path: Path) -> pydicom.Dataset | None:
    if not path.is_file() or path.stat().st_size < 132 or path.read_bytes()[128:132] != b"DICM":
        return None
    return pydicom.dcmread(path)


def _hu(slices: list[pydicom.Dataset]) -> np.ndarray:
    return np.stack([d.pixel_array.astype(np.int32) * int(d.RescaleSlope) + int(d.RescaleIntercept) for d in slices])


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _marks(folder: Path) -> list[Mark]:
    return read_labels(folder / "labels" / "nodules.jsonl")


def _mask(mark: Mark) -> np.ndarray:
    assert mark.mask is not None
    return mark.mask.decode()


def _lag_one_correlation(blur_px: float) -> float:
    """Correlation of neighbouring pixels that the filter of the noise gives."""
    weights = taps(blur_px).astype(np.float64)
    return float((weights[1:] * weights[:-1]).sum() / (weights**2).sum())


def test_same_seed_same_bytes_and_earlier_patients_do_not_depend_on_later_ones(study_folder: Path, tmp_path: Path):
    first = _tree(study_folder)
    assert make_phantom.main([str(tmp_path / "again"), *OPTIONS]) == 0
    assert _tree(tmp_path / "again") == first
    assert make_phantom.main([str(tmp_path / "fewer"), "--patients", "2", *OPTIONS[2:]]) == 0
    fewer = {name: data for name, data in _tree(tmp_path / "fewer").items() if "PA0" in name}
    assert fewer == {name: data for name, data in first.items() if "PA000001" in name or "PA000002" in name}
    assert make_phantom.main([str(tmp_path / "other"), "--patients", "1", *OPTIONS[2:6], "--seed", "4"]) == 0
    assert not set(_tree(tmp_path / "other" / "dicom" / "PA000001").values()) & set(first.values())


def test_every_instance_has_its_own_valid_uid(study_folder: Path):
    datasets = [d for d in map(_read, (study_folder / "dicom").rglob("*")) if d is not None]
    uids = [d.SOPInstanceUID for d in datasets]
    assert len(set(uids)) == len(uids)
    assert all(re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", uid) for uid in uids)
    assert all(d.file_meta.MediaStorageSOPInstanceUID == d.SOPInstanceUID for d in datasets)
    syntaxes = {d.file_meta.TransferSyntaxUID for d in datasets}
    assert syntaxes == {pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian}


def test_series_are_stacks_of_different_spacing_size_and_storage(series: dict[str, list[pydicom.Dataset]]):
    spacings = set()
    for slices in series.values():
        z = np.array([float(d.ImagePositionPatient[2]) for d in slices])
        np.testing.assert_allclose(np.diff(z), float(slices[0].SpacingBetweenSlices), atol=1e-3)
        spacings.add(float(slices[0].SpacingBetweenSlices))
        numbers = np.array([int(d.InstanceNumber) for d in slices])
        assert set(np.diff(numbers)) in ({1}, {-1})
    assert spacings == {5.0, 2.5, 1.25, 3.0}
    firsts = [slices[0] for slices in series.values()]
    assert {d.PixelRepresentation for d in firsts} == {0, 1}
    assert {int(d.RescaleIntercept) for d in firsts} == {0, -1024}
    assert len({float(d.PixelSpacing[0]) for d in firsts}) > 1
    assert {(d.Rows, d.Columns) for d in firsts} == {(96, 96), (84, 96)}
    assert {d.ConvolutionKernel for d in firsts} == {"SOFT", "LUNG"}
    assert all(str(d.PatientName).startswith("PHANTOM^") for d in firsts)


def test_file_names_do_not_give_the_order_away(study_folder: Path):
    for folder in (study_folder / "dicom").rglob("SE00000[23]"):
        z = [float(pydicom.dcmread(path).ImagePositionPatient[2]) for path in sorted(folder.iterdir())]
        assert z != sorted(z)
        assert z != sorted(z, reverse=True)


def test_an_export_has_more_in_it_than_volumes(study_folder: Path, series: dict[str, list[pydicom.Dataset]]):
    datasets = [d for d in map(_read, (study_folder / "dicom").rglob("*")) if d is not None]
    scouts = [d for d in datasets if "LOCALIZER" in d.get("ImageType", [])]
    assert {d.SeriesInstanceUID in series for d in scouts} == {True, False}
    assert {d.get("Modality") for d in datasets} == {"CT", "MR", "SR", None}
    assert any(d.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage for d in datasets)
    names = {path.name for path in (study_folder / "dicom").rglob("*")}
    assert {".DS_Store", "Thumbs.db", "VIEWER.EXE", "EMPTY.DCM", "DICOMDIR"} <= names
    record = json.loads((study_folder / "phantom.json").read_text())
    files = sum(path.is_file() for path in (study_folder / "dicom").rglob("*"))
    assert files == record["slices"] + record["other_files"]
    assert record["slices"] == sum(map(len, series.values()))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_tissues_have_the_hu_of_tissues(number: int):
    plan = plan_series(StudyPlan(0, 192, 56, number))[0]
    body, grid = plan.study.patient.body, plan.study.grid
    index = int(np.argmin(np.abs(plan.heights_mm - 0.4 * body.lung_height)))
    z = float(plan.heights_mm[index])
    hu = stored_values(plan, plan.slice_hu(index)) + plan.study.storage.intercept
    x, y = grid.x[None, :], grid.y[:, None]
    lung = lung_distance(body, x, y, z) < -6.0
    assert -870 < np.median(hu[lung]) < -700
    assert -850 < hu[lung].mean() < -700  # vessels and bronchi with it
    assert 25 < hu[heart_distance(body, x, y, z) < -15.0].mean() < 65
    assert 0.005 < (hu > 250).mean() < 0.06
    assert np.median(hu[:4, grid.columns // 2 - 20 : grid.columns // 2 + 20]) == pytest.approx(-1000, abs=8)
    corner = hu[grid.outside_circle()]
    assert (corner == -3024).all() if plan.study.storage.padded else corner.min() >= -1100


def test_a_slice_tells_its_height():
    """Heights of the body must look different, or nothing about them could be learnt: lung area, bone, mean."""
    plan = plan_series(StudyPlan(0, 96, 56, 0))[0]
    lungs = [float((abs(plan.slice_hu(i) + 820.0) < 80.0).mean()) for i in (2, 14, 28, 44, 50)]
    assert lungs[0] < 0.04 < lungs[1]
    assert lungs[1:] == sorted(lungs[1:], reverse=True)
    assert lungs[4] < 0.5 * lungs[3]


@pytest.mark.parametrize(("sigma", "blur"), [(11.0, 1.0), (22.0, 0.9)])
def test_noise_has_the_fitted_strength_and_correlation(sigma: float, blur: float):
    fields = [slice_noise(256, 256, sigma_hu=sigma, blur_px=blur, overlap=0.0, key=(1, 2), index=i) for i in (0, 1)]
    assert fields[0].std() == pytest.approx(sigma, rel=0.03)
    for neighbour in (fields[0][:, 1:] * fields[0][:, :-1], fields[0][1:] * fields[0][:-1]):
        assert neighbour.mean() / sigma**2 == pytest.approx(_lag_one_correlation(blur), abs=0.03)
    assert abs((fields[0] * fields[1]).mean()) < 0.03 * sigma**2


def test_overlapping_slices_share_noise_as_boxes_do():
    overlap = overlap_share(4.0, 3.0)
    first, second, third = (
        slice_noise(256, 256, sigma_hu=1.0, blur_px=0.9, overlap=overlap, key=(5,), index=i) for i in range(3)
    )
    assert (first * second).mean() == pytest.approx(0.25, abs=0.03)
    assert (first * third).mean() == pytest.approx(0.0, abs=0.03)
    assert first.std() == pytest.approx(1.0, rel=0.03)
    assert overlap_share(2.5, 5.0) == 0.0
    with pytest.raises(ValueError, match="overlap more"):
        overlap_share(5.0, 1.0)


def test_noise_of_a_slice_is_that_of_its_kernel():
    plan = plan_series(StudyPlan(0, 256, 56, 1))[0]
    clean = render(
        plan.study.patient,
        plan.study.grid,
        float(plan.heights_mm[40]),
        edge_mm=plan.protocol.edge_px * plan.study.grid.pixel_mm,
        thickness_mm=plan.protocol.thickness_mm,
    )
    noise = (plan.slice_hu(40) - clean) / plan.study.noise_spread
    middle = noise[96:160, 96:160]
    assert middle.std() == pytest.approx(11.0, rel=0.08)
    lag = (middle[:, 1:] * middle[:, :-1]).mean() / middle.var()
    assert lag == pytest.approx(_lag_one_correlation(plan.protocol.blur_px), abs=0.06)


def test_marks_point_at_what_is_in_the_files(study_folder: Path, series: dict[str, list[pydicom.Dataset]]):
    marks = _marks(study_folder)
    assert {mark.series for mark in marks} <= set(series)
    assert len(marks) >= 4
    for mark in marks:
        slices, mask = series[mark.series], _mask(mark)
        z, y, x, z_last, y_end, x_end = mark.box
        assert mask.shape[1:] == (y_end - y, x_end - x)
        assert all(mask.any(axis=axes)[[0, -1]].all() for axes in ((1, 2), (0, 2), (0, 1)))  # the box is tight
        positions = [float(d.ImagePositionPatient[2]) for d in slices]
        assert mark.mask is not None
        assert list(mark.mask.z_mm) == [position for position in positions if z <= position <= z_last]
        assert mark.ratings["texture"] in (1, 5)
    patients = {mark.target: series[mark.series][0].PatientID for mark in marks}
    assert all(series[mark.series][0].PatientID == patients[mark.target] for mark in marks)
    seen = [(mark.target, mark.series) for mark in marks]
    assert len(set(seen)) == len(seen)
    assert len({mark.target for mark in marks}) < len(marks)  # a nodule keeps its target in a patient's other series


def test_masks_agree_with_the_hu():
    """Inside a mask there is a nodule, outside there is lung: compared with the same patient without nodules."""
    study = StudyPlan(1, 128, 56, 1)
    plan = plan_series(study)[0]
    marks = make_phantom._marks(plan)
    assert marks
    for mark in marks:
        mask, (_, y, x, _, y_end, x_end) = _mask(mark), mark.box
        solid = mark.ratings["texture"] == 5
        wanted = 35.0 if solid else -520.0
        assert mark.mask is not None
        indices = [int(np.argmin(np.abs(plan.heights_mm + plan.offset_mm - z))) for z in mark.mask.z_mm]
        slices = np.stack([plan.slice_hu(index) for index in indices])
        volume = slices[:, y:y_end, x:x_end]
        around = slices[:, max(y - 3, 0) : y_end + 3, max(x - 3, 0) : x_end + 3]
        core = mask & (volume > wanted - 150)
        assert core.sum() > 0.4 * mask.sum()  # the rest is the blurred rim
        assert np.percentile(around, 20) < -700
        assert volume[mask].mean() > np.percentile(around, 20) + (400 if solid else 120)


@given(st.integers(0, 98), st.sampled_from([0, 7]))
def test_plans_are_pure_and_distinct(number: int, seed: int):
    plan = StudyPlan(seed, 256, 56, number)
    assert plan.uid("study") == StudyPlan(seed, 256, 56, number).uid("study")
    assert plan.uid("study") != StudyPlan(seed, 256, 55, number).uid("study")
    assert len(plan.patient_id) <= 64


def test_it_compresses_like_real_ct():
    """The fingerprint of 18 real series: hilp + zstd level 1 makes them 3.11 times smaller on a 512 matrix, pooled."""
    raw = packed = 0
    plans = [plan_series(StudyPlan(0, 512, 56, number)) for number in (0, 1, 2)]
    # As many slices of each series as it has a share of the phantom's.
    for plan, parts in ((plans[0][0], (0.5,)), (plans[1][0], (0.2, 0.7)), (plans[2][1], (0.15, 0.4, 0.6, 0.8))):
        for part in parts:
            index = int(part * plan.count)
            hu = (stored_values(plan, plan.slice_hu(index)) + plan.study.storage.intercept).astype(np.int16)
            raw += hu.nbytes
            packed += len(zstandard.ZstdCompressor(1).compress(bytes(apply_filter(hu, "hilp"))))
    assert raw / packed == pytest.approx(3.11, rel=0.1)


def test_a_second_run_changes_nothing(study_folder: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in study_folder.rglob("*")}
    assert make_phantom.main([str(study_folder), *OPTIONS]) == 0
    assert "was there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in study_folder.rglob("*")} == before


def test_other_options_and_foreign_folders_are_refused(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert make_phantom.main([str(study_folder), "--patients", "1"]) == 2
    assert "--patients 4 --slices 10 --size 96 --seed 3" in capsys.readouterr().err
    (tmp_path / "precious.txt").write_text("mine")
    assert make_phantom.main([str(tmp_path), *OPTIONS]) == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_what_a_killed_run_left_does_no_harm(tmp_path: Path):
    left = tmp_path / ".out.tmp" / "dicom"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half a file")
    assert make_phantom.main([str(tmp_path / "out"), "--patients", "1", "--slices", "3", "--size", "32"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").rglob("half"))


@pytest.mark.parametrize("wrong", [["--patients", "0"], ["--slices", "65"], ["--size", "x"], []])
def test_wrong_usage_exits_2(wrong: list[str], tmp_path: Path):
    with pytest.raises(SystemExit) as caught:
        make_phantom.main([*([str(tmp_path / "out")] if wrong else []), *wrong])
    assert caught.value.code == 2
