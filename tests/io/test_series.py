"""Slices of a series to volumes or a verdict: order, gaps, copies, geometry, frames, record (faults F01 to F04)."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.sequence import Sequence

from tests.io.dicom_factory import (
    COLUMNS,
    ROWS,
    expected_hu,
    set_pixels,
    slice_dataset,
    stored_slice,
    write,
    write_series,
)
from tests.io.series_reading import PATIENT, SERIES, code_of, read, volume_of

# ---------------------------------------------------------------------------------------------- order and record


def test_a_plain_series(tmp_path: Path) -> None:
    write_series(tmp_path, 5, step_mm=2.5)
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(5))
    assert volume.spacing_mm == (2.5, 0.7, 0.9)
    assert volume.z_positions_mm == (0.0, 2.5, 5.0, 7.5, 10.0)
    assert volume.orientation == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert (volume.id, volume.series, volume.patient) == (SERIES, SERIES, PATIENT)
    assert volume.facts["kernel"] == "B30f"
    assert volume.facts["kvp"] == 120.0
    assert volume.facts["manufacturer"] == "SIEMENS"
    assert volume.facts["rescale"] == [1.0, -1024.0]
    assert volume.facts["burned_in"] == "unknown"


@pytest.mark.parametrize("kind", ["shuffled", "constant", "absent"])
def test_instance_numbers_and_names_do_not_matter(tmp_path: Path, kind: str) -> None:  # F01
    numbers = random.Random(3).sample(range(1, 6), 5)

    def change(index: int, dataset: Dataset) -> None:
        dataset.InstanceNumber = {"shuffled": numbers[index], "constant": 1, "absent": None}[kind]
        dataset.SliceLocation = -index

    for index, path in enumerate(write_series(tmp_path, 5, change=change)):
        path.rename(tmp_path / f"f{numbers[index]}")
    assert np.array_equal(volume_of(tmp_path).hu, expected_hu(5))


def test_jitter_of_positions_is_tolerated(tmp_path: Path) -> None:
    def change(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [-10, -20, index + (0.009 if index % 2 else 0)]

    write_series(tmp_path, change=change)
    assert volume_of(tmp_path).hu.shape == (5, ROWS, COLUMNS)


def test_rows_bottom_to_top_are_kept_as_stored(tmp_path: Path) -> None:  # F04
    def change(_: int, dataset: Dataset) -> None:
        dataset.ImageOrientationPatient = [1, 0, 0, 0, -1, 0]

    write_series(tmp_path, change=change)
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(5))
    assert volume.orientation == (1, 0, 0, 0, -1, 0, 0, 0, 1)


def test_facts_that_differ_stand_once_a_slice(tmp_path: Path) -> None:
    def change(index: int, dataset: Dataset) -> None:
        dataset.KVP = str(100 + index)

    write_series(tmp_path, change=change)
    assert volume_of(tmp_path).facts["kvp"] == [100.0, 101.0, 102.0, 103.0, 104.0]


def test_free_text_is_withheld(tmp_path: Path) -> None:  # F44
    def change(_: int, dataset: Dataset) -> None:
        dataset.ConvolutionKernel = "ZZPHI"
        dataset.Manufacturer = "ZZPHI"
        dataset.PatientPosition = "ZZPHI"
        dataset.KVP = "19420228"

    write_series(tmp_path, change=change)
    facts = volume_of(tmp_path).facts
    assert facts["withheld"] == ["ConvolutionKernel", "Manufacturer", "PatientPosition"]
    assert "ZZPHI" not in str(facts)
    assert "19420228" not in str(facts)


# ---------------------------------------------------------------------------------------------- gaps, copies, strangers


def test_a_missing_slice_is_refused_with_its_place(tmp_path: Path) -> None:  # F02
    write_series(tmp_path, 9)
    (tmp_path / "004.dcm").unlink()
    volumes, rows = read(tmp_path)
    assert not volumes
    assert rows[0].code == "SLICE_GAP"
    assert "after 3.000 mm: 2.000 where slices are 1.000 mm apart" in rows[0].reason


def test_split_gaps_keeps_the_runs(tmp_path: Path) -> None:  # F02
    write_series(tmp_path, 12)
    (tmp_path / "004.dcm").unlink()
    (tmp_path / "010.dcm").unlink()
    volumes, rows = read(tmp_path, split_gaps=True)
    assert [volume.id for volume in volumes] == [f"{SERIES}-1", f"{SERIES}-2"]
    hu = expected_hu(12)
    assert np.array_equal(volumes[0].hu, hu[:4])
    assert np.array_equal(volumes[1].hu, hu[5:10])
    assert volumes[1].z_positions_mm == (5.0, 6.0, 7.0, 8.0, 9.0)
    assert [(row.code, row.files) for row in rows] == [("SPLIT_AT_GAPS", 1)]


def test_a_change_of_spacing_is_refused(tmp_path: Path) -> None:
    def change(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [-10, -20, index if index < 5 else 4 + (index - 4) * 2.5]

    write_series(tmp_path, 9, change=change)
    assert code_of(tmp_path) == "VARIABLE_SPACING"


def test_copies_are_dropped_and_said(tmp_path: Path) -> None:
    write_series(tmp_path)
    shutil.copy(tmp_path / "001.dcm", tmp_path / "copy.dcm")
    again = slice_dataset(3)
    again.SOPInstanceUID = "1.2.3.99"
    write(again, tmp_path / "again.dcm")
    volumes, rows = read(tmp_path)
    assert np.array_equal(volumes[0].hu, expected_hu(5))
    assert volumes[0].facts["dropped"] == {"duplicate": 2}
    assert [(row.code, row.files) for row in rows] == [("DUPLICATE_DROPPED", 2)]


def test_other_pixels_at_one_position_are_refused(tmp_path: Path) -> None:  # F03
    write_series(tmp_path / "a", 4)
    write_series(tmp_path / "b", 4, change=lambda index, dataset: set_pixels(dataset, stored_slice(index + 50)))
    assert code_of(tmp_path) == "DUPLICATE_POSITION"


def test_the_same_pixels_beside_each_other_are_no_copy(tmp_path: Path) -> None:
    write_series(tmp_path)
    moved = slice_dataset(2)
    moved.ImagePositionPatient = [-10.0, -19.5, 2.0]
    write(moved, tmp_path / "moved.dcm")
    assert code_of(tmp_path) == "DUPLICATE_POSITION"


def test_a_localizer_inside_is_dropped_and_said(tmp_path: Path) -> None:  # F04
    write_series(tmp_path)
    scout = slice_dataset(0)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    set_pixels(scout, stored_slice(0, 7, 5))
    write(scout, tmp_path / "scout.dcm")
    volumes, rows = read(tmp_path)
    assert np.array_equal(volumes[0].hu, expected_hu(5))
    assert volumes[0].facts["dropped"] == {"localizer": 1}
    assert [(row.code, row.files) for row in rows] == [("LOCALIZER_DROPPED", 1)]


def with_one_odd(folder: Path, **changes: Any) -> None:
    def change(index: int, dataset: Dataset) -> None:
        if index == 2:
            for keyword, value in changes.items():
                setattr(dataset, keyword, value)

    write_series(folder, change=change)


def test_series_whose_slices_differ_are_refused(tmp_path: Path) -> None:  # F04
    write_series(tmp_path / "matrix", change=lambda i, d: set_pixels(d, stored_slice(i, ROWS + (i == 2))))
    assert code_of(tmp_path / "matrix") == "MIXED_MATRIX"
    with_one_odd(tmp_path / "orientation", ImageOrientationPatient=[0.9848, 0.1736, 0, -0.1736, 0.9848, 0])
    assert code_of(tmp_path / "orientation") == "MIXED_ORIENTATION"
    with_one_odd(tmp_path / "spacing", PixelSpacing=[0.7, 0.91])
    assert code_of(tmp_path / "spacing") == "MIXED_SPACING"
    with_one_odd(tmp_path / "shift", ImagePositionPatient=[-8.0, -20.0, 2.0])
    assert code_of(tmp_path / "shift") == "SHIFTED_SLICES"
    with_one_odd(tmp_path / "modality", Modality="PT")
    assert code_of(tmp_path / "modality") == "MIXED_SERIES"


@pytest.mark.parametrize(
    ("keyword", "value", "code"),
    [
        ("ImagePositionPatient", None, "NO_POSITION"),
        ("ImagePositionPatient", [1e9, 0, 0], "NO_POSITION"),
        ("ImageOrientationPatient", None, "NO_POSITION"),
        ("PixelSpacing", None, "NO_PIXEL_SPACING"),
        ("PixelSpacing", [0, 0.7], "NO_PIXEL_SPACING"),
        ("RescaleSlope", None, "NO_RESCALE"),
        ("RescaleIntercept", None, "NO_RESCALE"),
        ("RescaleSlope", "0", "NO_RESCALE"),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "BAD_ORIENTATION"),
        ("BurnedInAnnotation", "YES", "BURNED_IN_ANNOTATION"),
        ("Modality", "MR", "NOT_CT"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"], "LOCALIZER"),
        ("ImageType", ["DERIVED", "PRIMARY", "PERFUSION", "RCBF"], "PARAMETRIC_MAP"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7", "SECONDARY_CAPTURE"),
        ("RescaleType", "Z_EFF", "NOT_HU"),
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1], "NOT_AXIAL"),
        ("BitsAllocated", 12, "PIXEL_FORMAT_UNSUPPORTED"),
        ("HighBit", 3, "PIXEL_FORMAT_UNSUPPORTED"),
    ],
)
def test_what_a_series_must_have(tmp_path: Path, keyword: str, value: Any, code: str) -> None:
    def change(_: int, dataset: Dataset) -> None:
        setattr(dataset, keyword, value)
        if value is None:
            delattr(dataset, keyword)

    write_series(tmp_path, change=change)
    assert code_of(tmp_path) == code


def test_burned_in_text_passes_only_when_allowed(tmp_path: Path) -> None:
    write_series(tmp_path, change=lambda _, dataset: setattr(dataset, "BurnedInAnnotation", "YES"))
    assert volume_of(tmp_path, allow_burned_in=True).facts["burned_in"] == "yes"


def tilt(index: int, dataset: Dataset) -> None:
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 0.9781476, 0.2079117]


def test_tilt_is_refused_or_kept_and_recorded(tmp_path: Path) -> None:  # F04
    write_series(tmp_path, change=tilt)
    assert code_of(tmp_path) == "GANTRY_TILT"
    volume = volume_of(tmp_path, allow_tilt=True)
    assert volume.facts["tilt_degrees"] == pytest.approx(12, abs=0.01)
    assert np.array_equal(volume.hu, expected_hu(5))


def test_few_slices_are_refused_unless_asked_for(tmp_path: Path) -> None:
    write_series(tmp_path, 2)
    assert code_of(tmp_path) == "TOO_FEW_SLICES"
    assert volume_of(tmp_path, min_slices=2).hu.shape[0] == 2


@pytest.mark.parametrize(
    ("changes", "spacing"),
    [({"SpacingBetweenSlices": "6.5"}, 6.5), ({}, 1.0), ({"SliceThickness": None}, 0.0)],
)
def test_a_single_slice(tmp_path: Path, changes: dict[str, Any], spacing: float) -> None:
    dataset = slice_dataset(0)
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    write(dataset, tmp_path / "one.dcm")
    assert volume_of(tmp_path, min_slices=1).spacing_mm == (spacing, 0.7, 0.9)
    dataset.GantryDetectorTilt = "-20"
    write(dataset, tmp_path / "one.dcm")
    assert code_of(tmp_path, min_slices=1) == "GANTRY_TILT"


# ---------------------------------------------------------------------------------------------- multi-frame


def multiframe(count: int, positions: list[float]) -> Dataset:
    """A Legacy Converted Enhanced CT whose frame i lies at positions[i]."""
    dataset = slice_dataset(0)
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(dataset, keyword)
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.2"
    dataset.NumberOfFrames = count
    set_pixels(dataset, np.stack([stored_slice(index) for index in range(count)]))

    def item(**values: Any) -> Sequence:
        inner = Dataset()
        for keyword, value in values.items():
            setattr(inner, keyword, value)
        return Sequence([inner])

    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = item(PixelSpacing=[0.7, 0.9], SliceThickness="1")
    shared.PixelValueTransformationSequence = item(RescaleSlope="1", RescaleIntercept="-1024", RescaleType="HU")
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for height in positions:
        frame = Dataset()
        frame.PlanePositionSequence = item(ImagePositionPatient=[0, 0, height])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return dataset


@pytest.mark.parametrize("syntax", ["native", "rle"])
def test_frames_are_slices(tmp_path: Path, syntax: str) -> None:
    dataset = multiframe(4, [3.0, 2.0, 1.0, 0.0])
    if syntax == "rle":
        dataset.compress(RLELosslessEncoder.UID, dataset.pixel_array, generate_instance_uid=False)
    write(dataset, tmp_path / "multi.dcm")
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(4)[::-1])
    assert volume.z_positions_mm == (0.0, 1.0, 2.0, 3.0)
    assert volume.facts["multiframe"] is True


@pytest.mark.parametrize("place", ["shared", "per frame"])
def test_one_enhanced_frame_in_each_file(tmp_path: Path, place: str) -> None:
    for index in range(4):
        dataset = multiframe(1, [float(index)])
        set_pixels(dataset, stored_slice(index))
        if place == "shared":
            (own,) = dataset.PerFrameFunctionalGroupsSequence
            dataset.SharedFunctionalGroupsSequence[0].PlanePositionSequence = own.PlanePositionSequence
            del dataset.PerFrameFunctionalGroupsSequence
        write(dataset, tmp_path / str(index))
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(4))
    assert volume.z_positions_mm == (0.0, 1.0, 2.0, 3.0)


def test_each_frame_has_its_own_rescale(tmp_path: Path) -> None:
    order = [2, 0, 3, 1]
    dataset = multiframe(4, [float(index) for index in order])
    set_pixels(dataset, np.stack([stored_slice(index) + np.uint16(10 * index) for index in order]))
    dataset.BitsStored, dataset.HighBit = 16, 15
    for index, frame in zip(order, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        scale = Dataset()
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = "1", str(-1024 - 10 * index), "HU"
        frame.PixelValueTransformationSequence = Sequence([scale])
    write(dataset, tmp_path / "multi.dcm")
    assert np.array_equal(volume_of(tmp_path).hu, expected_hu(4))


@pytest.mark.parametrize("keyword", ["StackID", "TemporalPositionIndex"])
def test_frames_of_several_stacks_are_not_interleaved(tmp_path: Path, keyword: str) -> None:
    dataset = multiframe(6, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0])
    for frames, codes in (([1] * 6, []), ([1, 1, 1, 2, 2, 2], ["MIXED_STACKS"])):
        for number, frame in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
            content = Dataset()
            setattr(content, keyword, str(number) if keyword == "StackID" else number)
            frame.FrameContentSequence = Sequence([content])
        write(dataset, tmp_path / "multi.dcm")
        volumes, rows = read(tmp_path)
        assert [row.code for row in rows] == codes
        assert len(volumes) == 1 - len(codes)


def test_pictures_with_a_palette_are_no_ct(tmp_path: Path) -> None:
    write_series(tmp_path, change=lambda _, dataset: setattr(dataset, "PhotometricInterpretation", "PALETTE COLOR"))
    assert code_of(tmp_path) == "SECONDARY_CAPTURE"


def test_frames_without_their_groups_are_refused(tmp_path: Path) -> None:
    dataset = multiframe(4, [3.0, 2.0, 1.0])
    write(dataset, tmp_path / "multi.dcm")
    assert code_of(tmp_path) == "FILES_DAMAGED"
    del dataset.PerFrameFunctionalGroupsSequence
    write(dataset, tmp_path / "multi.dcm")
    assert code_of(tmp_path) == "NO_POSITION"
